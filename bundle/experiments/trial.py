"""One cell of a sweep: pretrain, train a classifier, test it once; what is done is never done again.

A cell whose ``cell.json`` says that it is finished, with the hash of everything that shapes it, is never run again. An
unfinished one goes on from its last checkpoint; one with another hash is deleted and made anew.

A cell is locked while it is run (see `bundle.process.locked`), by the file ``<cell>.lock`` beside its folder: a second
process is refused. Its training process holds the lock too, so that a Dask worker that is lost while its training goes
on keeps others out.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundle.experiments.baselines import run_baseline
from bundle.preparation.store import write_json, write_text
from bundle.process import locked, run_bundle

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "scipy", "scikit-learn", "nilearn", "statsmodels", "captum")


@dataclass(frozen=True)
class Strategy:
    """A row of the table: how to pretrain, and overrides of the two stages; ``mask`` None: random weights."""

    name: str
    mask: str | None = None
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One strategy (or baseline), seed and fold; ``sha256`` covers everything that shapes its result."""

    strategy: Strategy
    seed: int
    fold: str
    folder: str
    store: str
    splits_file: str
    baseline: bool
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]
    steps: tuple[str, ...]
    resamples: int
    directory: str
    sha256: str


def is_finished(cell: Cell) -> bool:
    """Whether the cell's result is there and was made with what shapes the cell now."""
    record = _record(cell)
    return record is not None and record["sha256"] == cell.sha256 and record["finished"]


def _record(cell: Cell) -> dict | None:
    path = Path(cell.folder) / "cell.json"
    return json.loads(path.read_text()) if path.is_file() else None


def run_cell(cell: Cell) -> None:
    """Run the stages of one cell that are not done, then gather its scores, subjects and learning curves.

    Raises:
        InputError: another process is running it, or a stage did not finish.
    """
    with locked(Path(f"{cell.folder}.lock")) as lock:
        if not is_finished(cell):  # another process may have finished it since the plan was made
            _run_locked(cell, lock)


def _run_locked(cell: Cell, lock: int) -> None:
    folder = Path(cell.folder)
    record = _record(cell)
    if record is not None and record["sha256"] != cell.sha256:
        logger.warning("%s was made with other settings; it is deleted and made anew", folder)
        shutil.rmtree(folder)
        record = None
    record = record or {
        "strategy": cell.strategy.name,
        "kind": "baseline" if cell.baseline else "network",
        "seed": cell.seed,
        "fold": cell.fold,
        "sha256": cell.sha256,
        "settings": asdict(cell),
        "seconds": {},
        "finished": False,
    }
    stages = _baseline_stages(cell) if cell.baseline else _stages(cell, lock)
    for name, stage in stages.items():
        if name not in record["seconds"]:
            _write(cell, record)
            started = time.monotonic()
            stage()
            record["seconds"][name] = round(time.monotonic() - started, 1)
    if not cell.baseline:
        _gather(folder)
    _write(cell, record | {"finished": True, "versions": {name: version(name) for name in PACKAGES}})


def _write(cell: Cell, record: dict) -> None:
    write_json(Path(cell.folder) / "cell.json", record)


def _baseline_stages(cell: Cell) -> dict[str, Callable[[], Any]]:
    series = Path(cell.folder).parents[1] / "series"
    name, folder = cell.strategy.name, Path(cell.folder)
    run = partial(run_baseline, name, cell.store, cell.splits_file, folder, series, cell.resamples, cell.seed)
    return {"test": run}


def _stages(cell: Cell, lock: int) -> dict[str, Callable[[], Any]]:
    """The stages of a cell in order, each of which runs one process."""
    folder = Path(cell.folder)
    common = {"dataset_dir": cell.store, "splits_file": cell.splits_file, "seed": cell.seed} | dict(cell.overrides)
    common["bootstrap_resamples"] = cell.resamples
    pretraining = common | dict(cell.strategy.pretrain) | {"output_dir": folder / "pretrain"}
    encoder = "random" if cell.strategy.mask is None else folder / "pretrain" / "best.pt"
    training = common | dict(cell.strategy.train) | {"output_dir": folder / "train", "encoder_checkpoint": encoder}
    mask, overlays = cell.strategy.mask, cell.configs
    jobs: dict[str, tuple[str, list[str], dict]] = {}
    if mask is not None:
        jobs["pretrain"] = ("pretrain", ["pretrain", mask, *overlays], pretraining)
        if "reconstruct" in cell.steps:
            jobs["reconstruct"] = ("run", ["pretrain", mask, "reconstruct", *overlays], pretraining)
    jobs["train"] = ("run", ["train", *overlays], training)
    jobs["test"] = ("run", ["train", "evaluate", *overlays], training)
    if "attribute" in cell.steps:
        jobs["attribute"] = ("run", ["train", "attribute", *overlays], training)
    return {name: partial(run_bundle, *job, folder / "log.txt", lock, cell.directory) for name, job in jobs.items()}


def _gather(folder: Path) -> None:
    """Bring what the report needs to the top of the cell's folder, and drop checkpoints only a resume needs."""
    for name in ("scores.json", "subjects.tsv"):
        shutil.copy(folder / "train" / "evaluation" / name, folder / name)
    write_text(folder / "curves.tsv", learning_curves(folder).to_csv(sep="\t", index=False))
    for stage in ("pretrain", "train"):
        (folder / stage / "last.pt").unlink(missing_ok=True)


def learning_curves(folder: Path) -> pd.DataFrame:
    """Scalars that the stages wrote to TensorBoard: ``stage``, ``tag``, ``step``, ``value``, in order."""
    rows = []
    for stage in ("pretrain", "train"):
        if (folder / stage / "tensorboard").is_dir():
            events = EventAccumulator(str(folder / stage / "tensorboard"), size_guidance={"scalars": 0, "images": 1})
            events.Reload()
            for tag in events.Tags()["scalars"]:
                rows += [(stage, tag, event.step, event.value) for event in events.Scalars(tag)]
    table = pd.DataFrame(rows, columns=["stage", "tag", "step", "value"])
    return table.drop_duplicates(["stage", "tag", "step"], keep="last")  # a resumed epoch is written twice
