"""Lists of runs: every layout, labels and what is refused.

Pitfall 2. Not covered here: opening the files (test_bold.py).
"""

import random
from collections import Counter
from pathlib import Path

import pytest

from bundle.errors import InputError
from bundle.preparation.sources import find_runs, from_bids, from_table

NAME = "_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz"
PARTICIPANTS = "participant_id\tsite\tdiagnosis\tage\nsub-01\tA\tADHD\t9.5\nsub-02\tB\tcontrol\tn/a\n"


def touch(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


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

PHENOTYPES = (
    "ScanDir ID\tSite\tGender\tAge\tDX\tFull4 IQ\tQC_Athena\n"
    "10042\t5\t1\t9.5\t0\t-999\t1\n"
    "1000804\t1\t0\t12.0\t3\t110\t1\n"
    "10050\t2\t0\t12.0\tpending\t100\t1\n"
    "10051\t8\t0\t12.0\twithheld\t100\t1\n"
    "10052\t3\t0\t12.0\t-999\t100\t1\n"
)


@pytest.fixture
def athena(tmp_path):
    root = tmp_path / "adhd200"
    touch(root / "adhd200_preprocessed_phenotypics.tsv", PHENOTYPES)
    for name in ("0010042_session_1_rest_1", "0010042_session_1_rest_2", "0010042_session_2_rest_1"):
        touch(root / f"NYU/0010042/sfnwmrda{name}.nii.gz")
    for name in ("1000804", "0010050", "0010051", "0010052", "0019999"):
        touch(root / f"Peking_1/{name}/sfnwmrda{name}_session_1_rest_1.nii.gz")
    touch(root / "NYU/0010042/wssd0010042_session_1_anat.nii.gz")
    return root


def test_adhd200_keeps_every_subject_session_and_run_apart(athena):
    runs = {run["run_id"]: run for run in find_runs(athena)}
    assert [run_id for run_id in runs if "10042" in run_id] == [
        "sub-0010042_ses-1_task-rest_run-1", "sub-0010042_ses-1_task-rest_run-2", "sub-0010042_ses-2_task-rest_run-1",
    ]  # fmt: skip
    assert len(runs) == 8
    first = runs["sub-0010042_ses-1_task-rest_run-1"]
    assert (first["participant_id"], first["site"], first["diagnosis"]) == ("sub-0010042", "NYU", "control")
    assert first["participant"] == {"sex": "male", "age": 9.5, "Full4 IQ": None, "QC_Athena": 1, "dx": "control"}
    assert (first["space"], first["tr"]) == ("MNI152", None)
    case = runs["sub-1000804_ses-1_task-rest_run-1"]
    assert (case["site"], case["diagnosis"], case["participant"]["dx"]) == ("Peking", "adhd", "adhd-inattentive")


def test_adhd200_a_missing_label_is_kept_and_a_missing_row_is_a_problem(athena):
    """Who waits for a diagnosis is of use in pretraining; a run that no table knows is a mistake."""
    runs = {run["participant_id"]: run for run in find_runs(athena)}
    for subject in ("sub-0010050", "sub-0010051", "sub-0010052"):  # pending, withheld, -999
        assert runs[subject]["diagnosis"] is None
        assert "problem" not in runs[subject]
    assert "no row in the phenotypic table" in runs["sub-0019999"]["problem"]
    assert all("problem" not in run for run in find_runs(athena, labels="optional"))


def test_adhd200_site_tables_are_joined_and_must_agree(athena):
    (athena / "adhd200_preprocessed_phenotypics.tsv").unlink()
    touch(athena / "NYU/NYU_phenotypic.csv", "ScanDir ID,Site,DX\n10042,5,0\n")
    touch(athena / "Peking_1/Peking_1_phenotypic.csv", "ScanDirID,Site,Dx\n1000804,1,1\n")
    labels = {run["participant_id"]: run["diagnosis"] for run in find_runs(athena)}
    assert (labels["sub-0010042"], labels["sub-1000804"]) == ("control", "adhd")
    touch(athena / "general.csv", "ScanDir ID,Site,DX\n10042,5,2\n")
    with pytest.raises(InputError, match=r"10042 another site, diagnosis or sex"):
        find_runs(athena)
    touch(athena / "general.csv", "ScanDir ID,Site,DX\n10042,5,7\n")
    with pytest.raises(InputError, match="DX 7 for 10042"):
        find_runs(athena)


KEY = (  # the released key of the test set; NeuroIMAGE's lines have the disclaimer
    "Disclaimer,ID,Site,Gender,Age,Handedness,DX,Secondary Dx ,QC_Rest_1\n"
    ",1000804,1,0,12,L,3,ODD,1\n"
    ",10050,2,0,12,1,2,,1\n"
    "This data requires permission to use.,10051,8,0,12,N/A,0,N/A,0\n"
    ",10052,3,0,12,2,pending,pending,1\n"
    ",19999,5,1,7.5,-0.61,1,N/A,1\n"
)


def test_adhd200_the_released_key_says_what_the_phenotypes_withhold(athena):
    touch(athena / "allSubs_testSet_phenotypic_dx.csv", KEY)
    found = {run["participant_id"][4:]: run for run in find_runs(athena)}
    assert {name: run["participant"]["dx"] for name, run in found.items()} == {
        "0010042": "control",
        "0010050": "adhd-hyperactive/impulsive",
        "0010051": "control",
        "0010052": None,
        "0019999": "adhd-combined",
        "1000804": "adhd-inattentive",
    }
    assert [found[name]["diagnosis"] for name in sorted(found)] == ["control", "adhd", "control", None, "adhd", "adhd"]
    assert not [name for name, run in found.items() if "problem" in run]
    assert found["0019999"]["site"] == "NYU"  # known to the key alone
    joined = found["0010050"]["participant"]
    assert (joined["Full4 IQ"], joined["QC_Athena"], joined["QC_Rest_1"]) == (100, 1, 1)  # of both tables
    assert joined["Secondary Dx"] is None
    assert found["0010051"]["participant"]["Disclaimer"] == "This data requires permission to use."


def test_adhd200_codes_of_sex_and_handedness_are_words(athena, caplog):
    touch(athena / "allSubs_testSet_phenotypic_dx.csv", KEY.replace("12,L,3", "12,7,3"))
    found = {run["participant_id"][4:]: run["participant"] for run in find_runs(athena)}
    assert {name: (row["sex"], row.get("handedness"), row.get("handedness_score")) for name, row in found.items()} == {
        "0010042": ("male", None, None),
        "0010050": ("female", "right", None),
        "0010051": ("female", None, None),
        "0010052": ("female", "ambidextrous", None),
        "0019999": ("male", None, -0.61),  # NYU scores handedness
        "1000804": ("female", None, None),
    }
    assert "the handedness 7 of 1 participants is no code of ADHD-200" in caplog.text


@pytest.mark.parametrize(
    ("site", "cell", "hand", "score"),
    [
        (1, "0", "left", None),
        (1, "1", "right", None),
        (1, "2", "ambidextrous", None),
        (1, "R", "right", None),
        (1, "-999", None, None),
        (5, "1", None, 1),
        (5, "0", None, 0),
        (5, "0.18", None, 0.18),
        (4, "N/A", None, None),
    ],
)
def test_adhd200_handedness(athena, site, cell, hand, score):
    table = touch(athena / "one.csv", f"ScanDir ID,Site,Handedness,DX\n10042,{site},{cell},1\n")
    run = find_runs(athena, participants=table, labels="optional")[0]
    assert (run["participant"]["handedness"], run["participant"]["handedness_score"]) == (hand, score)


def test_adhd200_rows_are_counted_as_by_hand(tmp_path):
    """A made-up release of 90 rows: every label that one of the tables has, and no other, is found."""
    rng = random.Random(0)
    people = [(str(10000 + 7 * i), rng.choice("12345678"), rng.choice("01"), rng.choice("0123")) for i in range(90)]
    hidden = {person[0] for person in people[60:]}
    never = {person[0] for person in people[80:]}
    phenotypes = [[i, site, sex, "pending" if i in hidden else dx] for i, site, sex, dx in people]
    key = [["", i, site, sex, "pending" if i in never else dx] for i, site, sex, dx in people if i in hidden]
    for name, header, rows in (
        ("adhd200_preprocessed_phenotypics.tsv", ["ScanDir ID", "Site", "Gender", "DX"], phenotypes),
        ("allSubs_testSet_phenotypic_dx.csv", ["Disclaimer", "ID", "Site", "Gender", "DX"], key),
    ):
        separator = "\t" if name.endswith("tsv") else ","
        touch(tmp_path / name, "".join(separator.join(row) + "\n" for row in [header, *rows]))
    for i, *_ in people:
        touch(tmp_path / f"data/sfnwmrda{i.zfill(7)}_session_1_rest_1.nii.gz")
    runs = find_runs(tmp_path, layout="adhd200")
    words = {"0": "control", "1": "adhd-combined", "2": "adhd-hyperactive/impulsive", "3": "adhd-inattentive"}
    truth = Counter(None if i in never else words[dx] for i, _, _, dx in people)
    assert Counter(run["participant"]["dx"] for run in runs) == truth
    assert truth[None] == sum(run["diagnosis"] is None for run in runs) == 10
    assert sum(run["diagnosis"] == "control" for run in runs) == truth["control"]
    assert Counter(run["participant"]["sex"] for run in runs) == Counter(
        {"0": "female", "1": "male"}[sex] for _, _, sex, _ in people
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (",10042,5,1,9.5,1,1,,1\n", "10042 another site, diagnosis or sex"),
        (",10042,5,0,9.5,1,0,,1\n", "10042 another site, diagnosis or sex"),
        (",10042,4,1,9.5,1,0,,1\n", "10042 another site, diagnosis or sex"),
        (",1000804,1,0,12,L,1,,1\n", "1000804 another site, diagnosis or sex"),
        (",10042,5,1,9.5,1,4,,1\n", "DX 4 for 10042"),
    ],
)
def test_adhd200_a_key_that_contradicts_is_refused(athena, line, message):
    touch(athena / "allSubs_testSet_phenotypic_dx.csv", KEY + line)
    with pytest.raises(InputError, match=message):
        find_runs(athena)


def test_adhd200_lines_without_an_id_are_nobodys(athena):
    with (athena / "adhd200_preprocessed_phenotypics.tsv").open("a") as table:
        table.write("\t7\t\t\t0\t\t\n\t1\t\t\t1\t\t\n")
    assert len(find_runs(athena)) == 8


def test_adhd200_filtered_and_unfiltered_are_not_mixed(athena):
    touch(athena / "NYU/0010042/snwmrda0010042_session_1_rest_1.nii.gz")
    with pytest.raises(InputError, match="choose one with a glob"):
        find_runs(athena)
    assert len(find_runs(f"{athena}/**/sfnwmrda*.nii.gz")) == 8
    (run,) = find_runs(f"{athena}/**/snwmrda*.nii.gz")
    assert run["site"] == "NYU"  # the phenotypes lie in the folder where the glob begins


def test_nilearns_adhd_sample(tmp_path):
    root = tmp_path / "adhd"
    touch(
        root / "ADHD200_40subs_motion_parameters_and_phenotypics.csv",
        '"Subject","RestScan","MeanFD","age","sex","handedness","tdc","adhd","adhd_inattentive","adhd_combined","site"\n'
        '10042,"rest_1",0.1,9.5,"F",0.4,1,0,0,0,"NYU"\n1552181,"rest_1",0.2,8,"M","R",0,1,1,0,"KKI"\n',
    )
    for name in ("0010042", "1552181"):
        touch(root / f"data/{name}/{name}_rest_tshift_RPI_voreg_mni.nii.gz")
        touch(root / f"data/{name}/{name}_regressors.csv")
    control, case = find_runs(root)
    assert (control["run_id"], control["site"], control["diagnosis"]) == ("sub-0010042_task-rest", "NYU", "control")
    assert (case["site"], case["diagnosis"], case["participant"]["MeanFD"]) == ("KKI", "adhd", 0.2)
    assert case["confounds"].name == "1552181_regressors.csv"
    named = [[run["participant"][name] for name in ("dx", "sex", "handedness", "age")] for run in (control, case)]
    assert named == [["control", "female", None, 9.5], ["adhd-inattentive", "male", "right", 8]]


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


def test_the_layout_is_logged_and_never_guessed_between_two(athena, caplog):
    with caplog.at_level("INFO"):
        find_runs(athena)
    assert "has the layout adhd200" in caplog.text
    touch(athena / "data/0010042/0010042_rest_tshift_RPI_voreg_mni.nii.gz")
    with pytest.raises(InputError, match="looks like adhd200 and nilearn-adhd; say which with --layout"):
        find_runs(athena)
    assert len(find_runs(athena, layout="adhd200")) == 8


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
