"""Every overlay that trains a head, or adapts the encoder: trained, gone on with, tested, released and served."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_configs import run

from bundle.deploy.release import release
from bundle.training.checkpoints import load_checkpoint

WAYS = ("mlp", "neighbours", "lora", "prompts", "finetune")


@pytest.fixture(scope="module")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run("pretrain", dataset_dir=str(store), output_dir=str(folder))
    return folder / "best.pt"


def encoder_of(path: Path) -> dict[str, torch.Tensor]:
    weights = load_checkpoint(path)["network"]
    return {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_trained_gone_on_with_tested_and_served(pretrained, store, derivatives, tmp_path, way):
    options = {"dataset_dir": str(store), "encoder_checkpoint": str(pretrained), "output_dir": str(tmp_path / "out")}
    overlay = f"readouts/{way}"
    run("train", overlay, **options)
    run("train", overlay, **options, max_epochs=2)
    last = load_checkpoint(tmp_path / "out" / "last.pt")
    assert last["trainer"]["max_epochs"] == (1 if way == "neighbours" else 2)
    run("train", overlay, "evaluate", **options, max_epochs=2)
    tested = pd.read_csv(tmp_path / "out" / "evaluation" / "subjects.tsv", sep="\t").set_index("participant_id")
    assert tested.index.tolist() == json.loads((store / "splits.json").read_text())["sets"]["test"]
    before, after = encoder_of(pretrained), encoder_of(tmp_path / "out" / "last.pt")
    assert before.keys() == after.keys()
    same = [torch.equal(before[name], after[name]) for name in before]
    assert not any(same) if way == "finetune" else all(same)  # a frozen encoder is identical to the bit

    release(tmp_path / "out" / "best.pt", tmp_path / "models")
    given = {"dataset_dir": str(derivatives), "output_dir": str(tmp_path / "served")}
    same_form = [] if way == "finetune" else [overlay]  # a fine-tuned classifier is a classifier
    run("inference", *same_form, kind="infer", checkpoint=str(tmp_path / "models" / "model.pt"), **given)
    served = pd.read_csv(tmp_path / "served" / "predictions.tsv", sep="\t").set_index("participant_id")
    expected = tested["logit"].to_numpy()
    assert served.loc[tested.index, "logit"].to_numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_adapted_run_goes_on_to_the_same_weights(pretrained, store, tmp_path):
    options = {"dataset_dir": str(store), "encoder_checkpoint": str(pretrained)}
    run("train", "readouts/lora", **options, output_dir=str(tmp_path / "whole"), max_epochs=2)
    for epochs in (1, 2):
        run("train", "readouts/lora", **options, output_dir=str(tmp_path / "parts"), max_epochs=epochs)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt")["network"] for name in ("whole", "parts"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
