"""Cleaning against closed forms and a least-squares fit by numpy.

Not covered here: nilearn's own filter design and fMRIPrep's file names beyond one example.
"""

import json

import numpy as np
import pandas as pd
import pytest
from small_runs import coarse_signal, run_of, save_bold

from bundle.errors import InputError
from bundle.preparation import store
from bundle.preparation.chain import load_preparation
from bundle.preparation.confounds import Cleaning, clean_frames, framewise_displacement
from bundle.preparation.prepare import prepare
from bundle.preparation.transforms import CleanSignalsd

FRAMES, TR = 100, 2.0
SECONDS = np.arange(FRAMES) * TR
STEMS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    motion = pd.DataFrame(np.cumsum(rng.normal(0, 0.01, (FRAMES, 6)), axis=0), columns=STEMS)
    motion[["rot_x", "rot_y", "rot_z"]] /= 50
    motion.to_csv(tmp_path / "confounds.tsv", sep="\t", index=False)
    return tmp_path / "confounds.tsv"


def signals(voxels=7, seed=1):
    return np.random.default_rng(seed).normal(100, 5, (FRAMES, voxels)).astype(np.float32)


def clean(frames, cleaning, table=None, bold="run.nii.gz"):
    return clean_frames(frames.copy(), TR, cleaning, bold, table)


def test_regression_leaves_what_least_squares_leaves_and_the_mean(table):
    frames = signals()
    cleaned, done = clean(frames, Cleaning(("table",)), table)
    design = np.column_stack([pd.read_csv(table, sep="\t").to_numpy(), np.ones(FRAMES)])
    fitted = design @ np.linalg.lstsq(design, frames, rcond=None)[0]
    np.testing.assert_allclose(cleaned, frames - fitted + frames.mean(axis=0), atol=1e-3)
    assert done == {"censored": 0, "regressors": list(STEMS)}


def test_band_pass_keeps_the_band_and_the_mean():
    slow, kept, fast = (np.sin(2 * np.pi * hertz * SECONDS) for hertz in (0.005, 0.04, 0.2))
    cleaned, _ = clean((50 + slow + kept + fast)[:, None].astype(np.float32), Cleaning((), None, 0.02, 0.1))
    middle = slice(20, 80)  # away from the filter's edges
    assert np.corrcoef(cleaned[middle, 0], kept[middle])[0, 1] > 0.98
    assert abs(np.corrcoef(cleaned[middle, 0], fast[middle])[0, 1]) < 0.05
    assert cleaned.mean() == pytest.approx(50, abs=0.01)


def test_framewise_displacement_is_powers_sum(table):
    motion = pd.read_csv(table, sep="\t")
    steps = np.abs(np.diff(motion.to_numpy(), axis=0)) * [1, 1, 1, 50, 50, 50]
    np.testing.assert_allclose(framewise_displacement(motion, table), [0, *steps.sum(axis=1)])
    given = motion.assign(framewise_displacement=[np.nan, *range(99)])
    assert framewise_displacement(given, table).tolist() == [0, *range(99)]


def test_censored_frames_become_lines_between_their_neighbours(tmp_path):
    displacement = np.zeros(FRAMES)
    displacement[[0, 40, 41, 99]] = 3.0  # mm
    pd.DataFrame({"framewise_displacement": displacement}).to_csv(tmp_path / "c.csv", index=False)
    frames = signals()
    frames[[0, 40, 41, 99]] += 1000
    cleaned, done = clean(frames, Cleaning(max_fd=0.5), tmp_path / "c.csv")
    assert done["censored"] == 4
    kept = np.delete(np.arange(FRAMES), [0, 40, 41, 99])
    np.testing.assert_allclose(cleaned[kept], frames[kept], atol=1e-3)
    expected = [np.interp([0, 40, 41, 99], kept, frames[kept, voxel]) for voxel in range(frames.shape[1])]
    np.testing.assert_allclose(cleaned[[0, 40, 41, 99]], np.transpose(expected), atol=1e-3)


def test_a_run_that_moves_too_much_is_refused(tmp_path):
    pd.DataFrame({"framewise_displacement": np.full(FRAMES, 3.0)}).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(InputError, match="100 of 100 frames to censor"):
        clean(signals(), Cleaning(max_fd=0.5), tmp_path / "c.csv")


def test_fmriprep_confounds_by_strategy_and_the_record(tmp_path):
    name = "sub-01_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold"
    path = save_bold(tmp_path / f"{name}.nii.gz", coarse_signal(FRAMES), tr=TR)
    rng = np.random.default_rng(0)
    columns = ["csf", "white_matter", *STEMS]
    confounds = tmp_path / "sub-01_task-rest_desc-confounds_timeseries.tsv"
    pd.DataFrame(rng.normal(size=(FRAMES, 8)), columns=columns).to_csv(confounds, sep="\t", index=False)
    confounds.with_suffix(".json").write_text(json.dumps({}))
    run = run_of(path, "sub-01_task-rest", confounds=confounds)
    preparation = load_preparation(new_tr=TR, confounds=["wm_csf"])
    assert prepare([run], tmp_path / "store", preparation)["prepared"] == 1
    record = store.read_run(tmp_path / "store", "sub-01_task-rest")
    assert record["cleaning"] == {"censored": 0, "regressors": ["csf", "white_matter"]}
    assert store.read_manifest(tmp_path / "store")["parameters"]["steps"][2]["confounds"] == ["wm_csf"]
    z = store.read_clip(tmp_path / "store", run["run_id"], 0, FRAMES).astype(float)
    csf = pd.read_csv(confounds, sep="\t")["csf"].to_numpy()
    assert np.abs(np.corrcoef(csf, z[:, ::5000].T)[0, 1:]).max() < 0.01
    assert prepare([run], tmp_path / "store", preparation)["current"] == 1
    pd.DataFrame(rng.normal(size=(FRAMES, 8)), columns=columns).to_csv(confounds, sep="\t", index=False)
    assert prepare([run], tmp_path / "store", preparation)["prepared"] == 1  # other confounds, other result
    assert prepare([run], tmp_path / "store", load_preparation(new_tr=TR))["prepared"] == 1  # cleaning taken back


@pytest.mark.parametrize(
    ("cleaning", "name", "words"),
    [
        (Cleaning(("table",)), None, "no table of confounds"),
        (Cleaning(("table",)), "short.csv", "100 frames but 3 rows"),
        (Cleaning(("table",)), "absent.csv", "cannot be read"),
        (Cleaning(max_fd=0.5), "other.csv", "no framewise_displacement and no trans_x"),
        (Cleaning(("motion",)), None, "no usable fMRIPrep confounds"),
        (Cleaning(low_pass=0.3), None, "below 0.25 Hz"),
        (Cleaning(("table",)), "text.csv", "not numbers, in b; repair"),
        (Cleaning(("table",)), "gap.csv", "not numbers, in b; repair"),
        (Cleaning(("table",)), "many.csv", "100 frames and 100 confounds, which leave nothing"),
        (Cleaning(max_fd=0.5), "fd.csv", "framewise_displacement that is not a number"),
    ],
)
def test_confounds_that_do_not_fit_are_said(tmp_path, cleaning, name, words):
    pd.DataFrame({"a": [1, 2, 3]}).to_csv(tmp_path / "short.csv", index=False)
    pd.DataFrame({"a": range(FRAMES)}).to_csv(tmp_path / "other.csv", index=False)
    some = [None, *range(FRAMES - 1)]
    pd.DataFrame({"a": some, "b": [*some[:50], "x", *some[51:]]}).to_csv(tmp_path / "text.csv", index=False)
    pd.DataFrame({"a": some, "b": [*some[:50], None, *some[51:]]}).to_csv(tmp_path / "gap.csv", index=False)
    pd.DataFrame(np.eye(FRAMES)).to_csv(tmp_path / "many.csv", index=False)
    pd.DataFrame({"framewise_displacement": [*some[:50], None, *some[51:]]}).to_csv(tmp_path / "fd.csv", index=False)
    with pytest.raises(InputError, match=words):
        clean(signals(), cleaning, name and tmp_path / name, tmp_path / "sub-01_desc-preproc_bold.nii.gz")


def test_a_run_too_short_for_the_filter_is_said(tmp_path):
    with pytest.raises(InputError, match=r"cannot be cleaned .*padlen"):
        clean_frames(signals()[:12], TR, Cleaning(high_pass=0.01), tmp_path / "run.nii", None)


@pytest.mark.parametrize(
    "bad", [{"confounds": ("movement",)}, {"confounds": ("table", "motion")}, {"max_fd": 0}, {"high_pass": -1},
            {"low_pass": 0}, {"high_pass": 0.1, "low_pass": 0.1}]
)  # fmt: skip
def test_bad_choices_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Cleaning(**bad)


def test_nothing_is_cleaned_by_default():
    assert not Cleaning()
    assert not any(step.cleaning for step in load_preparation().steps if isinstance(step, CleanSignalsd))
