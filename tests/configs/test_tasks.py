"""Every kind of target is trained, tested, released, served and attributed, by every readout, on the tiny store."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from tiny_configs import run, sentence

from bundle.data.splits import make_splits, save_splits
from bundle.deploy.release import release
from bundle.errors import InputError
from bundle.preparation.store import read_manifest, write_manifest, write_record
from bundle.training.checkpoints import load_checkpoint, saved_facts

TARGETS = {"age": {"target": "age"}, "subtype": {"target": "subtype", "classes": ["none", "mild", "severe"]}}
MEASURES = {
    "age": {"r2", "pearson_r", "mae", "training_mean_mae"},
    "subtype": {"macro_auroc", "balanced_accuracy", "macro_f1", "accuracy", "majority_accuracy"},
}
FEW = {"network_def#components": {"group": [1]}}


@pytest.fixture(scope="module")
def grown(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny store twice, at one site; its participants have an age and a subtype, but for sub-11."""
    copy = shutil.copytree(store, tmp_path_factory.mktemp("grown") / "store")
    manifest = read_manifest(copy)
    for number, one in enumerate(manifest["runs"]):
        twin = {key: one[key].replace("sub-", "sub-x") for key in ("run_id", "participant_id")}
        shutil.copytree(copy / "runs" / one["run_id"], copy / "runs" / twin["run_id"])
        for own, age in ((one, 8.5 + number), (one | twin, 20.25 - number)):
            columns = {"age": age, "subtype": ("none", "mild", "severe")[number % 3]}
            columns = dict.fromkeys(columns) if own["participant_id"] == "sub-11" else columns
            write_record(copy, own | {"site": "north", "participant": columns})
    write_manifest(copy, manifest["parameters"], manifest["parameters_hash"])
    for name, target in TARGETS.items():
        save_splits(make_splits(read_manifest(copy)["runs"], 3, **target), copy / f"{name}.json")
    return copy


def settings(grown: Path, folder: Path, name: str, readout: str) -> dict:
    found = {"dataset_dir": str(grown), "splits_file": str(grown / f"{name}.json"), "encoder_checkpoint": "random"}
    found |= FEW if readout == "covariance" else {}
    return found | {"output_dir": str(folder / f"{name}-{readout}")} | TARGETS[name]


def overlays(readout: str) -> list[str]:
    return [] if readout == "mean" else [f"readouts/{readout}"]


@pytest.mark.parametrize("readout", ["mean", "attention", "covariance"])
@pytest.mark.parametrize("name", TARGETS)
def test_it_is_tested_released_served_and_attributed(grown, derivatives, tmp_path, name, readout):
    options = settings(grown, tmp_path, name, readout)
    run("train", *overlays(readout), **options)
    run("train", *overlays(readout), "evaluate", **options)
    folder = Path(options["output_dir"])
    scores = json.loads((folder / "evaluation" / "scores.json").read_text())
    assert set(scores["scores"]) - {"pearson_r_within_site", "macro_auroc_within_site"} == MEASURES[name]
    assert (folder / "evaluation" / "scores.png").stat().st_size > 1000
    tested = pd.read_csv(folder / "evaluation" / "subjects.tsv", sep="\t").set_index("participant_id")
    members = json.loads((grown / f"{name}.json").read_text())["sets"]["test"]
    assert tested.index.tolist() == [member for member in members if member != "sub-11"]

    release(folder / "best.pt", folder / "models")
    infer = {"dataset_dir": str(derivatives), "output_dir": str(tmp_path / "served")}
    infer |= {"checkpoint": str(folder / "models" / "model.pt")} | (FEW if readout == "covariance" else {})
    infer |= {"outputs": 3} if name == "subtype" else {}
    run("inference", *overlays(readout), kind="infer", **infer)
    served = pd.read_csv(tmp_path / "served" / "predictions.tsv", sep="\t").set_index("participant_id")
    columns = ["predicted"] if name == "age" else ["logit_none", "logit_mild", "logit_severe"]
    both = tested.index.intersection(served.index)  # the twins have no images
    assert len(both) > 1
    found, expected = served.loc[both, columns].to_numpy(), tested.loc[both, columns].to_numpy()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    about = json.loads((tmp_path / "served" / "predictions.json").read_text())
    assert set(about["columns"]) == set(served.reset_index())
    if name == "subtype":
        fixed = about["model"]["members"][0]["calibration"]
        shares = softmax(served[columns].to_numpy() / fixed["temperature"], axis=1)
        found = served[["probability_none", "probability_mild", "probability_severe"]].to_numpy()
        assert found == pytest.approx(shares, abs=1e-9)

    run("train", *overlays(readout), "attribute", **options, levels=["group"], gradient_steps=1, bootstrap_resamples=20)
    table = pd.read_csv(folder / "attribution" / "attribution.csv")
    sizes = table[(table["measure"] == "size") & (table["level"] == "group")]
    assert (sizes["value"] > 0).all()


def test_the_best_epoch_is_chosen_by_the_tasks_first_measure_and_the_facts_are_kept(grown, tmp_path):
    options = settings(grown, tmp_path, "age", "mean")
    run("train", **options)
    path = Path(options["output_dir"]) / "best.pt"
    facts = saved_facts(load_checkpoint(path), path)
    assert facts["task"]["kind"] == "regression"
    sets = json.loads((grown / "age.json").read_text())["sets"]["train"]
    known = {run["participant_id"]: run["participant"]["age"] for run in read_manifest(grown)["runs"]}
    ages = [known[name] for name in sets if known[name] is not None]
    assert facts["task"]["mean"] == pytest.approx(np.mean(ages))
    assert facts["task"]["sd"] == pytest.approx(np.std(ages))
    with pytest.raises(RuntimeError) as caught:
        run("train", "evaluate", **(options | TARGETS["subtype"]))
    assert "was made with" in sentence(caught.value)


def test_a_changed_label_is_noticed(grown, tmp_path):
    """Of a classifier that was trained on others; pretraining does not look at labels."""
    options = settings(grown, tmp_path, "age", "mean")
    run("train", **options)
    copy = shutil.copytree(grown, tmp_path / "store")
    manifest = read_manifest(copy)
    first = manifest["runs"][0]
    write_record(copy, first | {"participant": first["participant"] | {"age": 99.5}})
    write_manifest(copy, manifest["parameters"], manifest["parameters_hash"])
    with pytest.raises(RuntimeError) as caught:
        run("train", "evaluate", **(options | {"dataset_dir": str(copy)}))
    assert "was made with" in sentence(caught.value)


def test_several_classes_are_named_and_a_model_of_them_says_its_outputs(grown, derivatives, tmp_path):
    options = settings(grown, tmp_path, "subtype", "mean")
    with pytest.raises(RuntimeError) as caught:
        run("train", **(options | {"classes": None}))
    assert "has the classes mild, none, severe, but the network has 1 outputs" in sentence(caught.value)
    run("train", **options)
    release(tmp_path / "subtype-mean" / "best.pt", tmp_path / "models")
    given = {"dataset_dir": str(derivatives), "checkpoint": str(tmp_path / "models" / "model.pt")}
    with pytest.raises(RuntimeError) as caught:
        run("inference", kind="infer", output_dir=str(tmp_path / "out"), **given)
    assert "predicts subtype by 3 outputs, not 1; give --outputs 3" in sentence(caught.value)


def test_a_class_is_chosen_to_be_attributed_or_refused(grown, tmp_path):
    options = settings(grown, tmp_path, "subtype", "mean")
    run("train", **options)
    with pytest.raises(RuntimeError) as caught:
        run("train", "attribute", **options, of_class="moderate")
    assert "of_class is one of none, mild, severe; it cannot be 'moderate'" in sentence(caught.value)


def test_a_pretrained_network_is_not_released(store, tmp_path):
    run("pretrain", dataset_dir=str(store), output_dir=str(tmp_path / "pretrain"))
    with pytest.raises(InputError, match="a pretrained network, which predicts nothing"):
        release(tmp_path / "pretrain" / "best.pt", tmp_path / "models")
    assert not (tmp_path / "models").exists()
