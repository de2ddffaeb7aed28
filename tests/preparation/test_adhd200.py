"""ADHD-200 as Athena distributes it, and nilearn's sample: runs, tables, codes and what is refused."""

import random
from collections import Counter

import pytest
from small_runs import touch

from bundle.errors import InputError
from bundle.preparation.sources import find_runs

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


def test_the_layout_is_logged_and_never_guessed_between_two(athena, caplog):
    with caplog.at_level("INFO"):
        find_runs(athena)
    assert "has the layout adhd200" in caplog.text
    touch(athena / "data/0010042/0010042_rest_tshift_RPI_voreg_mni.nii.gz")
    with pytest.raises(InputError, match="looks like adhd200 and nilearn-adhd; say which with --layout"):
        find_runs(athena)
    assert len(find_runs(athena, layout="adhd200")) == 8
