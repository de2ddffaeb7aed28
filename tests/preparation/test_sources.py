"""Lists of runs: every layout, labels and what is refused.

Pitfall 2. Not covered here: opening the files (test_bold.py), ADHD-200 (test_adhd200.py).
"""

from pathlib import Path

import pytest
from small_runs import touch

from bundle.errors import InputError
from bundle.preparation.sources import find_runs, from_bids, from_table

NAME = "_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz"
PARTICIPANTS = "participant_id\tsite\tdiagnosis\tage\nsub-01\tA\tADHD\t9.5\nsub-02\tB\tcontrol\tn/a\n"


@pytest.fixture
def bids(tmp_path):
    root = tmp_path / "fmriprep"
    touch(root / "participants.tsv", PARTICIPANTS)
    touch(root / f"sub-01/func/sub-01_task-rest_run-1{NAME}")
    touch(root / f"sub-01/func/sub-01_task-rest_run-1{NAME.replace('preproc_bold', 'brain_mask')}")
    touch(root / f"sub-02/ses-a/func/sub-02_ses-a_task-rest{NAME}")
    touch(root / "sub-02/ses-a/func/sub-02_ses-a_task-rest_space-T1w_desc-preproc_bold.nii.gz")
    touch(root / "sub-02/ses-a/anat/sub-02_ses-a_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz")
    return root


def test_bids_runs_with_and_without_sessions(bids):
    first, second = from_bids(bids)
    assert first == {
        "run_id": "sub-01_task-rest_run-1",
        "participant_id": "sub-01",
        "bold": bids / f"sub-01/func/sub-01_task-rest_run-1{NAME}",
        "mask": bids / f"sub-01/func/sub-01_task-rest_run-1{NAME.replace('preproc_bold', 'brain_mask')}",
        "confounds": None,
        "tr": None,
        "space": None,
        "site": "A",
        "diagnosis": "ADHD",
        "participant": {"age": 9.5},
    }
    assert second["run_id"] == "sub-02_ses-a_task-rest"
    assert (second["mask"], second["diagnosis"], second["participant"]) == (None, "control", {"age": None})


def test_entities_count_by_key_not_by_place(bids):
    touch(bids / "sub-02/func/sub-02_space-MNI152_run-7_desc-preproc_acq-x_bold.nii.gz")
    assert "sub-02_run-7_acq-x" in [run["run_id"] for run in from_bids(bids)]


def test_participants_may_lie_above_the_derivatives(bids):
    (bids / "participants.tsv").rename(bids.parent / "participants.tsv")
    assert len(from_bids(bids)) == 2
    elsewhere = (bids.parent / "participants.tsv").rename(bids / "labels.tsv")
    with pytest.raises(InputError, match=r"no participants\.tsv"):
        from_bids(bids)
    assert len(from_bids(bids, participants=elsewhere)) == 2
    assert [run["diagnosis"] for run in from_bids(bids, labels="optional")] == [None, None]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("participant_id\tsite\tdiagnosis\n01\tA\t1\n", "sub-02 has no row"),
        ("participant_id\tsite\tdiagnosis\nsub-01\tA\t1\nsub-02\t\t0\n", "sub-02 has no site"),
    ],
)
def test_participants_without_a_row_or_a_site_are_a_problem_unless_labels_are_optional(bids, table, reason):
    touch(bids / "participants.tsv", table)
    good, bad = from_bids(bids)
    assert "problem" not in good
    assert bad["problem"].startswith(reason)
    assert all("problem" not in run for run in from_bids(bids, labels="optional"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("participant_id\tdiagnosis\n01\t0\n", "no column site"),
        ("participant_id\tsite\tdiagnosis\nsub-01\tA\t1\n01\tA\t1\n", "more than one row for 01"),
        ("participant_id\tsite\tdiagnosis\n", "no rows"),
        ("", "cannot be read as a table"),
    ],
)
def test_bad_participants_tables_are_refused(bids, table, message):
    touch(bids / "participants.tsv", table)
    with pytest.raises(InputError, match=message):
        from_bids(bids)


def test_an_infinite_value_is_kept_as_text_since_json_has_none(bids):
    (bids / "participants.tsv").write_text(PARTICIPANTS.replace("9.5", "inf"))
    assert [run["participant"]["age"] for run in from_bids(bids)] == ["inf", None]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (PARTICIPANTS + "\t\t\t\n", "no participant_id in line 4"),
        (PARTICIPANTS.replace("\n", "\t\n").replace("\t\n", "\n", 1), "more fields than its header"),
    ],
)
def test_tables_that_would_be_misread_are_refused(bids, table, message):
    (bids / "participants.tsv").write_text(table)
    with pytest.raises(InputError, match=message):
        from_bids(bids)


def test_blanks_around_a_cell_are_no_part_of_it(bids, tmp_path):
    (bids / "participants.tsv").write_text(PARTICIPANTS.replace("sub-01\tA", "sub-01 \t A ").replace("B", "A"))
    assert [(run["site"], run["diagnosis"]) for run in from_bids(bids)] == [("A", "ADHD"), ("A", "control")]
    touch(tmp_path / "runs.csv", "participant_id,bold,site,diagnosis\nsub-01,a.nii,A,0\nsub-01 ,b.nii,A ,0\n")
    assert {(run["participant_id"], run["site"]) for run in from_table(tmp_path / "runs.csv")} == {("sub-01", "A")}


def test_a_misspelt_choice_of_labels_is_refused(bids):
    with pytest.raises(InputError, match="labels must be required or optional, not 'requird'"):
        find_runs(bids, labels="requird")


def test_linked_subjects_are_found_and_hidden_folders_are_not(bids, tmp_path):
    touch(bids / ".git/annex/MD5E.nii.gz")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("participants.tsv", "sub-01", "sub-02"):
        (linked / name).symlink_to(bids / name)
    assert [run["run_id"] for run in find_runs(linked)] == [run["run_id"] for run in from_bids(bids)]
    (linked / "sub-02").unlink()
    (linked / ".git").symlink_to(bids / ".git")
    assert [run["run_id"] for run in find_runs(linked, layout="files")] == ["sub-01_task-rest_run-1"]


def test_subjects_that_bids_cannot_name_are_not_taken_for_one(bids):
    for subject in ("S_01", "S_02"):
        touch(bids / f"sub-{subject}/func/sub-{subject}_task-{subject[-1]}{NAME}")
    with pytest.raises(InputError, match=r"does not say its subject as BIDS does .* its folder sub-S_01"):
        from_bids(bids, labels="optional")


def test_every_layout_finds_what_fmriprep_wrote_beside_a_run(bids):
    folder = bids / "sub-01/func"
    mask = next(folder.glob("*_desc-brain_mask.nii.gz")).rename(folder / f"m{NAME}")
    mask = mask.rename(folder / f"sub-01_task-rest_run-1{NAME.replace('preproc_bold.nii.gz', 'brain_mask.nii')}")
    confounds = touch(folder / "sub-01_task-rest_run-1_desc-confounds_timeseries.tsv")
    rows = f"participant_id\tbold\tsite\tdiagnosis\nsub-01\t{folder}/sub-01_task-rest_run-1{NAME}\tA\t1\n"
    for source in (bids, f"{bids}/**/*_space-MNI*_desc-preproc_bold.nii.gz", touch(bids / "runs.tsv", rows)):
        run = find_runs(source)[0]
        assert (run["mask"], run["confounds"]) == (mask, confounds)


def test_files_without_a_subject_are_named_since_siblings_would_be_split(tmp_path, caplog):
    for name in ("one/rest1.nii", "one/rest2.nii"):
        touch(tmp_path / name)
    find_runs(tmp_path, labels="optional")
    assert "2 files, such as one_rest1, name no subject" in caplog.text


def test_nothing_found_is_an_error(tmp_path, bids):
    with pytest.raises(InputError, match="not a folder"):
        from_bids(tmp_path / "absent")
    touch(tmp_path / "raw/sub-01/func/sub-01_task-rest_bold.nii.gz")
    with pytest.raises(InputError, match=r"holds no .*space-MNI"):
        from_bids(tmp_path / "raw")


def test_one_run_in_two_spaces_is_refused(bids):
    touch(bids / "sub-02/ses-a/func/sub-02_ses-a_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    with pytest.raises(InputError, match="which are one run"):
        from_bids(bids)


def test_a_diagnosis_is_kept_as_it_is_written(tmp_path):
    rows = "007,a.nii.gz,A,ADHD-Combined\n008,b.nii.gz,A,1\n009,c.nii.gz,A,n/a\n"
    table = touch(tmp_path / "runs.csv", f"participant_id,bold,site,diagnosis\n{rows}")
    runs = from_table(table)
    assert [run["diagnosis"] for run in runs] == ["ADHD-Combined", "1", None]
    assert runs[0]["participant_id"] == "007"  # not the number 7
    assert all("problem" not in run for run in runs)


def test_table_paths_are_relative_to_the_table(tmp_path):
    table = touch(
        tmp_path / "data/runs.tsv",
        "participant_id\tbold\tmask\ttr\tsite\tdiagnosis\tsex\n"
        "1\t1/rest.nii.gz\t1/mask.nii.gz\t2.0\tA\t0\tF\n"
        "2\t2/rest.nii.gz\t\t\tA\t1\tM\n"
        f"3\t/abs/sub-3_task-rest{NAME}\t\t\tA\t1\tM\n",
    )
    runs = from_table(table)
    folder = tmp_path / "data"
    assert [run["run_id"] for run in runs] == ["1_rest", "2_rest", "sub-3_task-rest"]  # two files, one name
    assert [run["bold"] for run in runs[:2]] == [folder / "1/rest.nii.gz", folder / "2/rest.nii.gz"]
    assert runs[2]["bold"] == Path(f"/abs/sub-3_task-rest{NAME}")
    assert [run["mask"] for run in runs] == [folder / "1/mask.nii.gz", None, None]
    assert [run["tr"] for run in runs] == [2.0, None, None]
    assert runs[0]["participant"] == {"sex": "F"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("participant_id,site,diagnosis\n1,A,0\n", "no column bold"),
        ("participant_id,bold,site,diagnosis\n,a.nii,A,0\n", "no participant_id in line 2"),
        ("participant_id,bold,site,diagnosis\n1,a.nii,A,0\n1,b.nii,B,0\n", "1 more than one site"),
        ("participant_id,bold,site,diagnosis\n1,x/a.nii,A,0\n1,y/a.nii,A,0\n", "run id 1_a"),
        ("participant_id,bold,site,diagnosis,tr\n1,a.nii,A,0,2s\n", "TR '2s' in line 2"),
    ],
)
def test_bad_tables_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        from_table(touch(tmp_path / "runs.csv", content))


def test_tables_that_are_no_tables_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"\.csv or \.tsv"):
        from_table(touch(tmp_path / "runs.xlsx"))
    with pytest.raises(InputError, match="cannot be read"):
        from_table(tmp_path / "absent.csv")


# --- other layouts ----------------------------------------------------------------------------------------------------


def test_a_folder_a_glob_and_a_file(tmp_path):
    for name in ("a/rest.nii.gz", "b c/rest.nii", "b c/rest_mask.nii", "sub-07_task-x_bold.nii"):
        touch(tmp_path / "data" / name)
    touch(tmp_path / "data/notes.txt")
    touch(tmp_path / "data/pair.hdr")
    touch(tmp_path / "data/pair.img")
    runs = find_runs(tmp_path / "data", labels="optional")
    assert [run["run_id"] for run in runs] == ["a_rest", "b-c_rest", "pair", "sub-07_task-x"]
    assert [run["run_id"] for run in find_runs(f"{tmp_path}/data/*/rest.nii*", labels="optional")] == [
        "a_rest",
        "b-c_rest",
    ]
    (run,) = find_runs(tmp_path / "data/a/rest.nii.gz", labels="optional", tr=2.0, space="MNI")
    assert (run["run_id"], run["tr"], run["space"]) == ("rest", 2.0, "MNI")
    touch(tmp_path / "labels.csv", "participant_id,site,diagnosis\na_rest,A,1\n")
    first, second, *_ = find_runs(tmp_path / "data", participants=tmp_path / "labels.csv")
    assert (first["diagnosis"], "no row" in second["problem"]) == ("1", True)


@pytest.mark.parametrize(
    ("source", "layout", "words"),
    [
        ("absent", "auto", "does not exist"),
        ("empty", "auto", r"holds no \.nii"),
        ("empty", "adhd200", "no phenotypic table"),
        ("raw", "auto", "holds no sub-.*space-MNI"),
        ("raw", "bids200", "layout must be one of auto, bids"),
        ("raw/*_nothing.nii", "auto", r"holds no \.nii"),
    ],
)
def test_sources_without_runs_are_refused(tmp_path, source, layout, words):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "raw/sub-01/func/sub-01_task-rest_bold.nii.gz")
    with pytest.raises(InputError, match=words):
        find_runs(tmp_path / source, layout=layout)


def test_loops_of_links_end_and_linked_folders_are_followed(tmp_path: Path):
    """Two loops in one folder have 2 to the 40 paths before the system says stop."""
    touch(tmp_path / "in" / "a" / "rest.nii")
    touch(tmp_path / "elsewhere" / "rest.nii")
    for name in ("loop", "other"):
        (tmp_path / "in" / "a" / name).symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "itself").symlink_to(tmp_path / "in" / "itself")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    runs = find_runs(tmp_path / "in", labels="optional")
    assert [run["run_id"] for run in runs] == ["a_rest", "linked_rest"]
