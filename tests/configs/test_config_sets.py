"""What the configs read and choose: each set its own subjects, every clip once, the best weights, no look at the test.

Not covered here: training itself (test_configs.py).
"""

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from small_stores import planted_store
from tasks import BINARY, subjects_of
from tiny_configs import ROOT

from bundle.data.splits import SETS, make_splits, save_splits
from bundle.preparation.store import read_manifest
from bundle.training.provenance import entries

PARTS = {"train": "train#", "validation": "validate#", "test": ""}
STAGES = {"pretrain": ["pretrain"], "classify": ["train"], "test": ["train", "evaluate"]}


@pytest.fixture(scope="module")
def small_store(tmp_path_factory) -> Path:
    """36 participants with three clips each: 12 of them in each set."""
    store = planted_store(tmp_path_factory.mktemp("data"), subjects=36, effect=0.0, frames=60, per_label=1, every=40)
    save_splits(make_splits(read_manifest(store)["runs"], folds=3), store / "splits.json")
    return store


def parsed(store: Path, *names: str, **changes: object) -> ConfigParser:
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / "configs" / f"{name}.json") for name in names]))
    settings = {"bundle_root": str(ROOT), "dataset_dir": str(store), "output_dir": str(store / "output")}
    for name, value in (settings | {"frames": 4, "batch_size": 5, "num_workers": 0} | changes).items():
        parser[name] = value
    return parser


def members(store: Path, subset: str) -> list[str]:
    return json.loads((store / "splits.json").read_text())["sets"][subset]


@pytest.mark.parametrize(
    ("stage", "subset"),
    [(stage, subset) for stage in STAGES for subset in SETS if (subset == "test") == (stage == "test")],
)
def test_loaders_give_every_clip_of_their_own_set_once(small_store, stage, subset):
    """36 clips in batches of 5: a dropped last batch would be seen. All stages read the same split file."""
    loader = parsed(small_store, *STAGES[stage]).get_parsed_content(f"{PARTS[subset]}dataloader")
    clips = [(item["participant_id"], item["start"]) for batch in loader for item in batch]
    assert sorted(name for name, _ in clips) == sorted(3 * members(small_store, subset))
    assert subset == "train" or {start for _, start in clips} == {0, 20, 40}  # the same in every epoch


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_several_gpus_share_the_validation_set_and_repeat_no_clip(small_store, stage, monkeypatch):
    shares = []
    monkeypatch.setattr("bundle.data.batches.idist.get_world_size", lambda: 5)
    for rank in range(5):  # of 36 clips
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 5)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        loader = parsed(small_store, stage, "multi_gpu").get_parsed_content("validate#dataloader")
        shares += list(loader.sampler)
    assert sorted(shares) == list(range(36))


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_one_switch_sets_the_precision_of_training_and_validation(small_store, stage):
    """MONAI's own mixed precision, which would be float16 and of CUDA only, stays off."""
    parser = parsed(small_store, stage, precision="bf16")
    inferer = parser.get_parsed_content("inferer")
    assert inferer.precision == "bf16"
    assert parser.get_parsed_content("train#inferer") is parser.get_parsed_content("validate#inferer") is inferer
    assert "amp" not in json.dumps(parser["train"]["trainer"]) + json.dumps(parser["validate"]["evaluator"])


def test_the_best_weights_on_validation_are_frozen_and_tested(small_store):
    assert parsed(small_store, "train").get_parsed_content("encoder_checkpoint") == "output/pretrain/best.pt"
    parser = parsed(small_store, "train", "evaluate")
    assert parser.get_parsed_content("checkpoint") == str(small_store / "output" / "best.pt")
    assert parser["run#0#path"] == "@checkpoint"


@pytest.mark.parametrize(("stage", "metric", "sign"), [("pretrain", "val_masked_mse", -1), ("train", "val_auroc", 1)])
def test_best_is_by_validation_and_in_the_right_direction(small_store, stage, metric, sign):
    parser = parsed(small_store, stage, embed_dim=4, depths=[1, 1, 1, 1])
    parser["validate#evaluator"] = SimpleNamespace(state=SimpleNamespace(metrics={metric: 0.7}))
    targets = [handler["_target_"] for handler in parser["train#handlers"]]
    keep = parser.get_parsed_content(f"train#handlers#{targets.index('bundle.training.checkpoints.KeepCheckpoints')}")
    assert keep.sign * keep.metric() == sign * 0.7


def test_the_test_config_takes_the_threshold_from_validation(small_store, tmp_path):
    parser = parsed(small_store, "train", "evaluate", output_dir=str(tmp_path), bootstrap_resamples=20)
    ran: list[str] = []
    for name, logits in (("validation", [-3.0, -2.0, 1.0, 2.0]), ("test", [-9.0, -8.0, -7.0, 5.0])):
        members = [run["participant_id"] for run in read_manifest(small_store)["runs"]][:4]
        rows = subjects_of([0, 0, 1, 1], logits, members).drop(columns="site")
        parser[f"{name}_scores"] = SimpleNamespace(subjects=rows, task=BINARY)
        evaluator = SimpleNamespace(run=lambda name=name: ran.append(name), network=torch.nn.Linear(1, 1))
        parser["validate#evaluator" if name == "validation" else "evaluator"] = evaluator
    parser.get_parsed_content("run#1")
    assert ran == ["validation", "test"]
    summary = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert summary["threshold"] == -0.5  # the test set's own would be -7.5
    assert pd.read_csv(tmp_path / "evaluation" / "subjects.tsv", sep="\t")["logit"].tolist() == [-9, -8, -7, 5]


SHARED = ("pretrain", "train", "inference")
OF_ITS_OWN = {
    "imports", "dataset_dir", "output_dir", "outputs", "batch_size", "network_def#_target_", "network_def#in_channels",
    "network",
    "optimizer#params", "loss#_target_", "inferer#precision", "dataloader", "train#dataset#transform",
    "train#preprocessing#random", "train#reports#description", "train#handlers#2#objects#epoch_loss",
    "train#handlers#2#metric", "train#handlers#2#lower_is_better", "train#trainer#prepare_batch",
    "validate#dataset#transform", "validate#evaluator#_target_", "prepare_batch#transforms", "prepare_batch#encode",
    "run", "run#0#_target_", "run#1", "scatter#normalisation",
}  # fmt: skip
"""Entries of one name that are meant to differ between pretraining, classification and service."""


def test_what_the_configs_share_is_the_same_in_each():
    """Each must run by itself, from any folder, so a fact stands in several; here is what keeps them from drifting."""
    contents = {name: dict(entries(json.loads((ROOT / "configs" / f"{name}.json").read_text()))) for name in SHARED}
    differing = set()
    for one, other in combinations(SHARED, 2):
        common = contents[one].keys() & contents[other].keys()
        assert len(common) > 15, (one, other)
        differing |= {name for name in common if contents[one][name] != contents[other][name]}
    assert sorted(differing - OF_ITS_OWN) == []
