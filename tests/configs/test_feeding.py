"""The way of a batch to the device, and the share of time that a trainer waits for it.

Not covered: pinned memory and CUDA.
"""

import json
import logging
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ignite.engine import Engine

from bundle.data.batches import PrepareBatch, keep_items
from bundle.training.handlers import DataWaiting
from bundle.training.reports import training_reports

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_collated_arrays_are_tensors_of_the_same_type_and_memory():
    item = {"run_id": "a", "frames": np.ones((2, 3), np.float16), "voxels": np.arange(3, dtype=np.int32), "fill": -1.0}
    [kept] = keep_items([item])
    assert (kept["frames"].dtype, kept["voxels"].dtype) == (torch.float16, torch.int32)
    assert kept["frames"].data_ptr() == item["frames"].ctypes.data
    assert (kept["run_id"], kept["fill"]) == ("a", -1.0)


def test_tensors_travel_before_the_transforms():
    """ "meta" stands for a device: it shows where tensors are without needing one."""
    seen = []

    def transform(item):
        seen.append(item["frames"].device.type)
        return item | {"image": torch.zeros(1, 2, 2, 2, 1)}

    items = keep_items([{"participant_id": "a", "frames": np.ones((2, 3), np.float16)}])
    PrepareBatch([transform])(items, torch.device("meta"), non_blocking=True)
    assert seen == ["meta"]


def test_the_share_of_waiting_is_logged_per_epoch(caplog, monkeypatch):
    """With a clock of its own, each batch takes 3 s to come and 1 s to be used."""
    clock = [0.0]
    monkeypatch.setattr("bundle.training.handlers.time.perf_counter", lambda: clock[0])

    def pass_time(seconds):
        clock[0] += seconds

    def slow():
        for number in range(5):
            pass_time(3)
            yield number

    engine = Engine(lambda engine, batch: pass_time(1))
    waiting = DataWaiting()
    waiting.attach(engine)
    with caplog.at_level(logging.INFO, logger="bundle.training.handlers"):
        engine.run(slow(), max_epochs=1, epoch_length=5)
    assert waiting.share == 0.75
    assert "epoch 1: 20.0 s, of which 75 % waiting for data" in caplog.text


@pytest.mark.parametrize("name", ["pretrain", "train"])
def test_training_counts_its_waiting_apart_from_validation(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    assert any(isinstance(report, DataWaiting) for report in training_reports(name, Mock()))
    assert config["train"]["reports"]["_target_"] == "bundle.training.reports.training_reports"
    assert config["train"]["trainer"]["train_handlers"] == "$@train#reports + @train#handlers"  # validation comes after
    assert "monai.handlers.ValidationHandler" in [handler["_target_"] for handler in config["train"]["handlers"]]
    assert config["loader"]["pin_memory"] == "$@device.type == 'cuda'"
    assert all(config[part]["dataloader"]["_target_"] == "@loader" for part in ("train", "validate"))
