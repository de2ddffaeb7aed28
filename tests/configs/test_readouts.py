"""Every readout is trained, tested, released, served and attributed on the tiny store.

Not covered: what a readout is worth on real data.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from monai.bundle import ConfigWorkflow
from tiny_configs import run, sentence

from bundle.deploy.release import release
from bundle.training.checkpoints import load_checkpoint

READOUTS = ("attention", "covariance")


@pytest.fixture(scope="module")
def output(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each readout of random weights, trained, tested and released."""
    folder = tmp_path_factory.mktemp("readouts")
    for name in READOUTS:
        train(store, folder, name)
        train(store, folder, name, "evaluate")
        release(folder / name / "best.pt", folder / name / "models")
    return folder


def train(store: Path, folder: Path, name: str, *overlays: str, **changes: object) -> ConfigWorkflow:
    settings = {"dataset_dir": str(store), "output_dir": str(folder / name), "encoder_checkpoint": "random"}
    return run("train", f"readouts/{name}", *overlays, **(settings | changes))


def infer(model: Path, data: Path, target: Path, *overlays: str, **changes: object) -> pd.Series:
    settings = {"dataset_dir": str(data), "output_dir": str(target), "checkpoint": str(model)}
    run("inference", *overlays, kind="infer", **(settings | changes))
    return pd.read_csv(target / "predictions.tsv", sep="\t").set_index("participant_id")["logit"]


@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_scores_whole_runs_and_is_served_as_it_was_tested(
    output: Path, store: Path, derivatives: Path, tmp_path: Path, name: str
):
    tested = pd.read_csv(output / name / "evaluation" / "subjects.tsv", sep="\t").set_index("participant_id")
    assert tested.index.tolist() == json.loads((store / "splits.json").read_text())["sets"]["test"]
    assert (tested["clips"] == 1).all()  # one run each
    assert tested["logit"].nunique() == len(tested)
    served = infer(output / name / "models" / "model.pt", derivatives, tmp_path, f"readouts/{name}")
    assert served[tested.index].to_numpy() == pytest.approx(tested["logit"].to_numpy(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_is_attributed_over_whole_runs(output: Path, store: Path, name: str):
    train(store, output, name, "attribute", levels=["group"], gradient_steps=1, bootstrap_resamples=50)
    table = pd.read_csv(output / name / "attribution" / "attribution.csv")
    assert set(table["method"]) == {"ablation"} | ({"integrated_gradients"} if name == "attention" else set())
    sizes = table[(table["measure"] == "size") & (table["level"] == "group")]
    assert np.isfinite(sizes["value"]).all()
    assert (sizes["value"] > 0).all()


def test_a_finished_fit_is_not_repeated_and_other_settings_are_refused(output: Path, store: Path):
    path = output / "covariance" / "last.pt"
    before = path.stat().st_mtime_ns
    assert load_checkpoint(path)["best"]["epoch"] == 1
    train(store, output, "covariance")
    assert path.stat().st_mtime_ns == before
    with pytest.raises(RuntimeError) as caught:
        train(store, output, "covariance", **{"network_def#components": {"group": [2], "label": [1]}})
    assert "was made with network_def#components#group [1, 2], but here it is [2]" in sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "overlay", "words", "changes"),
    [
        (
            "covariance",
            "readouts/covariance",
            "fitted with components {'group': [1, 2], 'label': [1]}, but here it is {'group': [2], 'label': [1]}",
            {"network_def#components": {"group": [2], "label": [1]}},
        ),
        ("covariance", "readouts/attention", "do not fit a AttentionClassifier", {}),
    ],
)
def test_a_model_of_another_readout_is_refused(output, derivatives, tmp_path, name, overlay, words, changes):
    one = next(derivatives.glob("sub-*/func/*_bold.nii.gz"))
    with pytest.raises(RuntimeError) as caught:
        infer(output / name / "models" / "model.pt", one, tmp_path, overlay, **changes)
    assert words in sentence(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"freeze_encoder": False}, "need a frozen encoder"), ({"network_def#queries": 2}, None)],
)
def test_whole_runs_need_a_frozen_encoder(store: Path, tmp_path: Path, changes: dict, words: str | None):
    if words is None:
        train(store, tmp_path, "attention", **changes)
        assert load_checkpoint(tmp_path / "attention" / "best.pt")["network"]["queries"].shape == (2, 32)
        return
    with pytest.raises(RuntimeError) as caught:
        train(store, tmp_path, "attention", **changes)
    assert words in sentence(caught.value)
