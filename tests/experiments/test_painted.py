"""Painted time courses: made-up series in a made-up atlas against nilearn's masker, and the real ones where they are.

Not covered: whether what is found in painted volumes holds for real images.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.image import resample_to_img
from nilearn.maskers import NiftiLabelsMasker
from scipy.signal import detrend

from bundle.errors import InputError
from bundle.experiments.painted import paint
from bundle.experiments.sweep import is_synthetic
from bundle.files import file_sha256
from bundle.preparation.bold import open_bold
from bundle.preparation.sources import find_runs

AGES = {"kid1": 5.0, "kid2": 6.9, "kid3": 7.0, "kid4": 11.0, "old1": 30.0, "old2": 41.0}
NUMBERS = [2001, 2002, 3001, 9170]


@pytest.fixture
def given(tmp_path: Path) -> dict:
    """Arguments for children against children: 6 subjects, 30 frames, 4 boxes stored LAS in MNI space at 4 mm."""
    labels = np.zeros((40, 40, 40), np.int16)
    for number, (x, y) in zip(NUMBERS, [(8, 8), (8, 22), (22, 8), (22, 22)], strict=True):
        labels[x : x + 10, y : y + 10, 15:25] = number
    affine = np.diag([-4.0, 4, 4, 1])
    affine[:3, 3] = 78, -98, -60
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "atlas.nii.gz")
    names = pd.DataFrame({"column": range(4), "aal_value": NUMBERS, "name": list("abcd")})
    names.to_csv(tmp_path / "atlas.tsv", sep="\t", index=False)
    people = pd.DataFrame({"participant_id": [f"sub-{name}" for name in AGES], "Age": list(AGES.values())})
    people = people.assign(Child_Adult=["child"] * 4 + ["adult"] * 2, Gender=list("FMFMFM")).iloc[::-1]
    people.to_csv(tmp_path / "people.tsv", sep="\t", index=False)
    save_series(tmp_path / "series.npz", 5 + 3 * np.random.default_rng(0).standard_normal((6, 30, 4)))
    files = {"series": "series.npz", "participants": "people.tsv", "atlas": "atlas.nii.gz"}
    paths = {name: tmp_path / file for name, file in files.items()}
    return paths | {"folder": tmp_path / "painted", "column": "Age", "threshold": 7.0, "where": "Child_Adult=child",
                    "voxel_mm": 6.0}  # fmt: skip


def save_series(path: Path, series: np.ndarray, subjects: list[str] | None = None) -> None:
    np.savez(path, subjects=np.array(subjects or [f"sub-{name}" for name in AGES]), series=series.astype(np.float32))


def bold_of(folder: Path, name: str) -> Path:
    return folder / name / "func" / f"{name}_task-painted_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"


def label_means(bold: Path, atlas: Path, numbers: list[int]) -> np.ndarray:
    """(T, labels) by nilearn, without a trend."""
    image = nib.load(bold)
    labels = resample_to_img(nib.load(atlas), image.slicer[..., 0], interpolation="nearest", force_resample=True,
                             copy_header=True)  # fmt: skip
    masker = NiftiLabelsMasker(labels, detrend=True, standardize=None)
    means = masker.fit_transform(image)
    return means[:, [list(masker.region_ids_.values()).index(number) - 1 for number in numbers]]


def test_every_label_has_its_course_in_world_space(given):
    folder = paint(**given, frames=25)
    series = np.load(given["series"])["series"][:, :25]
    for row, name in enumerate(list(AGES)[:4]):
        means = label_means(bold_of(folder, f"sub-{name}"), given["atlas"], NUMBERS)
        course = detrend(series[row], axis=0)
        r = np.corrcoef(means.T, course.T)[:4, 4:]
        assert np.diag(r).min() > 0.98
        assert np.abs(r - np.diag(np.diag(r))).max() < 0.75  # 25 frames of white noise
        signal = nib.load(bold_of(folder, f"sub-{name}")).get_fdata()
        assert (means / signal[signal > 0].mean()).std() == pytest.approx(0.01, rel=0.35)


def test_sources_find_the_runs_and_what_makes_a_case(given):
    folder = paint(**given)
    runs = find_runs(folder)
    found = {run["participant_id"]: (run["site"], run["diagnosis"], run["participant"]["age"]) for run in runs}
    groups = {name: "adhd" if age >= 7 else "control" for name, age in AGES.items()}
    assert found == {f"sub-kid{n}": ("painted", groups[f"kid{n}"], AGES[f"kid{n}"]) for n in (1, 2, 3, 4)}
    assert all(run["mask"] is not None and "problem" not in run for run in runs)
    written = pd.read_csv(folder / "participants.tsv", sep="\t")
    assert list(written) == ["participant_id", "site", "diagnosis", "age", "Child_Adult", "sex"]
    assert list(written["sex"]) == list("FMFM")
    assert open_bold(runs[0]["bold"]).tr == 2.0
    record = json.loads((folder / "painted.json").read_text())
    assert record["what"] == "real time courses painted into MNI volumes"
    assert record["parameters"]["sha256"]["series"] == file_sha256(given["series"])
    assert record["subjects"] == {"adhd": 2, "control": 2}
    assert is_synthetic([str(run["bold"]) for run in runs]) is False


def test_adults_against_children_and_an_image_does_not_depend_on_the_question(given, tmp_path):
    ages = paint(**given)
    other = paint(**given | {"folder": tmp_path / "other", "column": "Child_Adult", "threshold": None, "where": None,
                             "case": "adult, teenager"})  # fmt: skip
    assert [run["diagnosis"] for run in find_runs(other)] == ["control"] * 4 + ["adhd"] * 2
    for name in list(AGES)[:4]:
        assert bold_of(ages, f"sub-{name}").read_bytes() == bold_of(other, f"sub-{name}").read_bytes()


def test_same_again_is_left_alone_and_another_is_refused(given):
    folder = paint(**given)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    paint(**given)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    for change in ({"seed": 1}, {"tr": 1.0}, {"frames": 20}, {"threshold": 6.0}, {"where": None}):
        with pytest.raises(InputError, match="other parameters"):
            paint(**given | change)
    save_series(given["series"], np.random.default_rng(1).standard_normal((6, 30, 4)))
    with pytest.raises(InputError, match="other parameters"):
        paint(**given)


def test_an_interrupted_run_leaves_nothing_behind(given, monkeypatch):
    def broken(*arguments):
        raise KeyboardInterrupt

    before = sorted(given["folder"].parent.rglob("*"))
    monkeypatch.setattr("bundle.experiments.painted.write_run", broken)
    with pytest.raises(KeyboardInterrupt):
        paint(**given)
    assert sorted(given["folder"].parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"case": "child"}, "either case"),
        ({"threshold": None}, "either case"),
        ({"threshold": 100.0}, "gives 0 cases and 4 controls"),
        ({"where": "child"}, "COLUMN=VALUE"),
        ({"where": "Group=child"}, "no column Group"),
        ({"column": "Weight"}, "no column Weight"),
        ({"column": "Gender"}, "Gender of .* is not a number"),
        ({"frames": 31}, "frames must be a whole number of 2 to 30"),
        ({"tr": 0.0}, "tr of site"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments_are_refused(given, change, message):
    with pytest.raises(InputError, match=message):
        paint(**given | change)
    assert not given["folder"].exists()


@pytest.mark.parametrize(
    ("series", "subjects", "message"),
    [
        (np.ones((6, 30, 5)), None, "has 5 columns, but the atlas has 4 labels"),
        (np.ones((6, 30, 4)), None, "does not change, of sub-kid1 in column 0"),
        (np.full((6, 30, 4), np.nan), None, "NaN or infinite, of sub-kid1"),
        (np.ones((5, 30, 4)), None, "of shape .5, 30, 4. for 6 subjects"),
        (np.eye(4)[None], ["sub-unknown"], "no row for 1 subjects of the series, such as sub-unknown"),
        (np.eye(4)[None], ["../escape"], "'sub-../escape'; give each a name"),
        (np.stack([np.eye(4)] * 2), ["kid1", "sub-kid1"], "'sub-kid1'; give each a name"),
    ],
)
def test_bad_series_are_refused(given, series, subjects, message):
    save_series(given["series"], series, subjects)
    with pytest.raises(InputError, match=message):
        paint(**given)
    assert not given["folder"].exists()


def test_files_that_are_something_else_are_refused(given):
    np.save(given["series"].with_suffix(".npy"), np.eye(3))
    for path in (given["series"].with_suffix(".npy"), given["participants"], given["folder"]):
        with pytest.raises(InputError, match=r"is not an \.npz file"):
            paint(**given | {"series": path})
    other = given["atlas"].with_name("other.nii.gz")
    other.write_bytes(given["atlas"].read_bytes())
    header, *rows = given["atlas"].with_name("atlas.tsv").read_text().splitlines()
    other.with_name("other.tsv").write_text("\n".join([header, *rows[::-1]]))
    with pytest.raises(InputError, match="ascending"):
        paint(**given | {"atlas": other})


def test_a_participant_without_a_value_is_named(given):
    people = pd.read_csv(given["participants"], sep="\t")
    people.loc[people["participant_id"] == "sub-kid2", "Age"] = np.nan
    people.to_csv(given["participants"], sep="\t", index=False)
    with pytest.raises(InputError, match="no Age for sub-kid2"):
        paint(**given)


def test_real_courses_come_back_from_the_volumes(shared, tmp_path):
    with np.load(shared / "devfmri" / "aal116_timeseries.npz") as file:
        subjects, series = file["subjects"][[0, -1]], file["series"][[0, -1], :60]  # a child and an adult
    np.savez(tmp_path / "two.npz", subjects=subjects, series=series)
    atlas, table = shared / "atlas" / "AAL116_res-02_dseg.nii.gz", shared / "atlas" / "AAL116_dseg.tsv"
    folder = paint(
        tmp_path / "two.npz", tmp_path / "painted", shared / "devfmri" / "participants.tsv", atlas,
        "Child_Adult", case="adult", voxel_mm=4.0,
    )  # fmt: skip
    names = pd.read_csv(table, sep="\t")
    large = names[names["name"].isin(["Precentral_L", "Precentral_R", "Temporal_Mid_L", "Cerebelum_Crus1_R"])]
    for subject, courses in zip(subjects, series, strict=True):
        means = label_means(bold_of(folder, str(subject)), atlas, large["aal_value"].tolist())
        real = detrend(courses[:, large["column"]], axis=0)
        assert len(large) == 4
        assert all(np.corrcoef(mean, course)[0, 1] > 0.9 for mean, course in zip(means.T, real.T, strict=True))
