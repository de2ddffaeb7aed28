"""From a training to served scans: who is unlike the training subjects is noticed, and who is like them is not."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_runs import COARSE_SHAPE, coarse_brain, save_bold, save_derivatives, save_mask
from tiny_configs import run, sentence

from bundle.data.splits import save_splits, splits_of
from bundle.deploy.release import release
from bundle.preparation.prepare import prepare
from bundle.preparation.sources import find_runs
from bundle.training.checkpoints import load_checkpoint, write_checkpoint

NAMES = [f"sub-{number:02d}" for number in range(12)]
SETS = {"train": NAMES[:8], "validation": NAMES[8:10], "test": NAMES[10:]}


def scan(seed: int, invert: bool = False, skull: bool = False, noise: bool = False, scale: float = 1.0) -> np.ndarray:
    """Bright above and dark below, in units that differ by 3 % between people, with 2 % of fluctuation."""
    rng = np.random.default_rng(seed)
    height = 1 + rng.normal(0.5, 0.02) * np.linspace(-1, 1, COARSE_SHAPE[2])[None, None, :, None]
    mean = (2 - height if invert else height) * scale * rng.normal(1000, 30)
    course = rng.normal(1, 0.02, (*COARSE_SHAPE, 30))
    values = rng.normal(1000, 400, course.shape) if noise else mean * course
    inside = coarse_brain()[..., None]
    outside = 300 * course if skull else 0
    return np.where(inside, values, outside).astype(np.float32)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Derivatives of 12 people of one scanner, with masks and head motion."""
    folder = tmp_path_factory.mktemp("people")
    rows = ["participant_id\tsite\tdiagnosis"]
    for number, name in enumerate(NAMES):
        func = save_derivatives(folder, name, scan(number))
        fd = np.random.default_rng(number).lognormal(-2, 0.3, 30)
        table = func / f"{name}_task-rest_desc-confounds_timeseries.tsv"
        table.write_text("framewise_displacement\n" + "\n".join(f"{value:.4f}" for value in fd) + "\n")
        rows.append(f"{name}\tnorth\t{'adhd' if number % 2 else 'control'}")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and a released classifier."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(find_runs(people), folder / "store")
    save_splits(splits_of(SETS), folder / "store" / "splits.json")
    train(folder, 0)
    release(folder / "0" / "best.pt", folder / "models")
    return folder


def train(folder: Path, seed: int) -> None:
    settings = {"dataset_dir": str(folder / "store"), "encoder_checkpoint": "random", "seed": seed}
    run("train", **settings, output_dir=str(folder / str(seed)))


def serve(models: Path, data: Path, out: Path, **options: object) -> pd.DataFrame:
    given = {"checkpoint": str(models / "model.pt"), "dataset_dir": str(data), "output_dir": str(out)}
    run("inference", kind="infer", **given, **options)
    return read(out)


def read(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "predictions.tsv", sep="\t").set_index("participant_id")


@pytest.fixture(scope="module")
def strangers(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of runs that differ in one thing each."""
    folder = tmp_path_factory.mktemp("strangers")
    mask = save_mask(folder / "mask.nii.gz", coarse_brain())
    half = coarse_brain()
    half[:, :, 14:] = False
    scans = {
        "usual": (scan(50), mask, 0.8),
        "inverted": (scan(51, invert=True), mask, 0.8),
        "scanner": (scan(52, scale=20), mask, 0.8),
        "noise": (scan(53, noise=True), mask, 0.8),
        "skull": (scan(54, skull=True), "", 0.8),
        "half": (scan(55), save_mask(folder / "lower.nii.gz", half), 0.8),
        "slow": (scan(56), mask, 2.0),
    }
    rows = ["participant_id\tbold\tmask\ttr\tspace"]
    for name, (data, brain, tr) in scans.items():
        rows.append(f"{name}\t{save_bold(folder / f'{name}.nii.gz', data, tr=tr)}\t{brain}\t{tr}\tMNI")
    (folder / "runs.tsv").write_text("\n".join(rows) + "\n")
    return folder / "runs.tsv"


def test_people_of_the_same_cohort_are_like_and_those_of_training_are_known(trained, people, tmp_path):
    table = serve(trained / "models", people, tmp_path)
    assert (table["flag"] == "like").all()
    assert table["reasons"].isna().all()
    assert table["known"].fillna("").tolist() == ["training"] * 8 + ["validation"] * 2 + [""] * 2
    about = json.loads((tmp_path / "predictions.json").read_text())
    assert list(about["known_participants"]) == NAMES[:10]
    fixed = about["model"]["members"][0]["calibration"]
    assert table["predicted"].tolist() == (table["logit"] > fixed["threshold"]).astype(int).tolist()
    chances = 1 / (1 + np.exp(-table["logit"] / fixed["temperature"]))
    assert table["probability"].to_numpy() == pytest.approx(chances.to_numpy())


def test_a_known_scan_is_noticed_under_another_name_and_compression(trained, people, tmp_path):
    bold = next((people / NAMES[0] / "func").glob("*_bold.nii.gz"))
    (tmp_path / "x_space-MNI_bold.nii").write_bytes(gzip.decompress(bold.read_bytes()))
    mask = next((people / NAMES[0] / "func").glob("*mask.nii.gz"))
    rows = ["participant_id\tbold\tmask\ttr", f"x\tx_space-MNI_bold.nii\t{mask}\t0.8"]
    (tmp_path / "runs.tsv").write_text("\n".join(rows) + "\n")
    assert serve(trained / "models", tmp_path / "runs.tsv", tmp_path / "out")["known"].tolist() == ["training"]


def test_strangers_are_flagged_with_the_reason(trained, strangers):
    table = serve(trained / "models", strangers, strangers.parent / "out")
    assert table["flag"].to_dict() == {"usual": "like"} | dict.fromkeys(sorted(set(table.index) - {"usual"}), "unlike")
    assert table["probability"].notna().all()
    for name, words in {
        "inverted": "intensity, most of all mean of",
        "scanner": "intensity, most of all mean (+",
        "noise": "intensity",
        "skull": "the brain mask's origin",
        "half": "coverage",
        "slow": "the TR is 2 s, and of the training subjects 0.8 s",
    }.items():
        assert words in table.loc[name, "reasons"], name


def test_strangers_get_no_score_where_that_is_asked_for(trained, strangers):
    out = strangers.parent / "out"
    with pytest.raises(RuntimeError) as caught:
        serve(trained / "models", strangers, out, refuse_unlike=0.99)
    assert "6 of 7 participants are too unlike the training subjects" in sentence(caught.value)
    table = read(out)
    assert (table["flag"] == "refused").sum() == 6
    assert table[["probability", "logit", "predicted"]].notna().all(axis=1).to_dict() == {
        name: name == "usual" for name in table.index
    }
    about = json.loads((out / "predictions.json").read_text())
    assert set(about["refused_participants"]) == set(table.index) - {"usual"}


def test_an_ensemble_of_two_seeds_is_served_with_its_limits(trained, strangers, tmp_path):
    train(trained, 1)
    out = strangers.parent / "out"  # where the runs are prepared already
    checkpoints = [trained / str(seed) / "best.pt" for seed in range(2)]
    both = serve(release(checkpoints, tmp_path / "models").parent, strangers, out)
    alone = [serve(release(one, tmp_path / one.parent.name).parent, strangers, out) for one in checkpoints]
    chances = np.stack([table["probability"] for table in alone])
    assert both["logit"].to_numpy() == pytest.approx(np.mean([table["logit"] for table in alone], axis=0))
    assert both["probability_low"].to_numpy() == pytest.approx(chances.min(0))
    assert both["probability_high"].to_numpy() == pytest.approx(chances.max(0))
    assert (chances.max(0) > chances.min(0)).all()


def test_what_is_known_of_the_training_subjects_is_made_once_also_after_a_kill(trained, tmp_path):
    path = shutil.copytree(trained / "0", tmp_path / "0") / "best.pt"
    (tmp_path / "store").symlink_to(trained / "store")
    before = path.stat().st_mtime_ns
    train(tmp_path, 0)
    assert path.stat().st_mtime_ns == before
    saved = load_checkpoint(path)
    whole = saved.pop("reference")
    write_checkpoint(saved, path)  # as of a training that was killed just before
    train(tmp_path, 0)
    again = load_checkpoint(path)["reference"]
    assert again["hashes"] == whole["hashes"]
    assert again["calibration"] == whole["calibration"]
    assert again["features"]["others"].tolist() == whole["features"]["others"].tolist()
