"""The way of a batch to the device, and the share of time that a trainer waits for it.

Not covered: pinned memory and CUDA.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from bundle.data.batches import PrepareBatch, keep_items
from bundle.training.handlers import Throughput
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


def test_speed_waiting_and_time_left_are_metrics_of_each_epoch(monkeypatch):
    """With a clock of its own, each batch of 8 clips takes 3 s to come and 1 s to be used, and a validation 30 s."""
    clock = [0.0]
    monkeypatch.setattr("bundle.training.handlers.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("bundle.training.handlers.idist", SimpleNamespace(get_world_size=lambda: 2))

    def pass_time(seconds):
        clock[0] += seconds

    class Slow:
        def __len__(self):
            return 5

        def __iter__(self):
            for _ in range(5):
                pass_time(3)
                yield [None] * 8

    seen = []
    engine = Engine(lambda engine, batch: pass_time(1))
    Throughput().attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(dict(engine.state.metrics)))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: pass_time(30))
    engine.run(Slow(), max_epochs=3)
    assert [metrics["clips_per_second"] for metrics in seen] == [4.0] * 3  # 80 clips of two processes in 20 s
    assert [metrics["waiting_for_data"] for metrics in seen] == [0.75] * 3
    # 20 s for 5 steps, then with the validation 70 s for 10
    assert [metrics["hours_left"] * 3600 for metrics in seen] == pytest.approx([40, 35, 0])
    assert all(0.01 < metrics["memory_gib"] < 1000 for metrics in seen)


@pytest.mark.parametrize("name", ["pretrain", "train"])
def test_training_counts_its_waiting_apart_from_validation(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    assert any(isinstance(report, Throughput) for report in training_reports(name, Mock()))
    assert config["train"]["reports"]["_target_"] == "bundle.training.reports.training_reports"
    assert config["train"]["trainer"]["train_handlers"] == "$@train#reports + @train#handlers"  # validation comes after
    assert "monai.handlers.ValidationHandler" in [handler["_target_"] for handler in config["train"]["handlers"]]
    assert config["loader"]["pin_memory"] == "$@device.type == 'cuda'"
    assert all(config[part]["dataloader"]["_target_"] == "@loader" for part in ("train", "validate"))
