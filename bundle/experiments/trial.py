"""One trial of a sweep: pretrain, train a classifier, test it once; what is done is never done again.

A trial whose `trial.json` says that it is finished, with the hash of everything that shapes it, is never run again.
An unfinished one goes on from its last checkpoint; one with another hash is deleted and made anew.

A trial is locked while it is run (see `bundle.locks.locked`), by the file `<trial>.lock` beside its folder: a second
process is refused. Its training process holds the lock too, so that a Dask worker that is lost while its training goes
on keeps others out.

Trials that pretrain alike, and differ only in what is read of the encoder, share one pretraining: a trial's `pretrain`
is a link to a folder of `pretrainings/`, named by the hash of what shapes it. It has a lock of its own, for which the
others wait, and a file `<stage>.done` for each of its stages that is done.
"""

import json
import logging
import math
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
from bundle.files import write_json, write_text
from bundle.locks import locked
from bundle.process import run_config

logger = logging.getLogger(__name__)

REGION = "region"
"""The mask that pretrain.json draws without an overlay."""

PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "scipy", "scikit-learn", "nilearn", "statsmodels", "captum")


@dataclass(frozen=True)
class Strategy:
    """A row of the table: how to pretrain, and overrides of the two stages.

    Attributes:
        name: of the row.
        mask: what is masked in pretraining: "region" (pretrain.json as it is), an overlay of configs/masks, or the path
            of one; None: no pretraining, random weights.
        pretrain: config id to value, for pretraining.
        train: the same, for classification.
        readout: of the encoder: an overlay of configs/readouts; None: the mean, as in train.json.
        atlas: of both stages, and of the baseline; None: that of the sweep's overrides, AAL3 if they name none.
        baseline: one of `bundle.experiments.baselines.BASELINES`, tested instead of a network.
        harmonise: of a baseline: "combat", see `bundle.experiments.baselines.run_baseline`.
    """

    name: str
    mask: str | None = None
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    readout: str | None = None
    atlas: str | None = None
    baseline: str | None = None
    harmonise: str | None = None

    @property
    def overlays(self) -> list[str]:
        """The overlays of pretrain.json, names or paths as for `bundle.files.config_file`."""
        if self.mask in (None, REGION):
            return []
        return [self.mask if self.mask.endswith(".json") else f"masks/{self.mask}"]

    @property
    def readouts(self) -> list[str]:
        """The overlays of train.json, named likewise."""
        if self.readout is None:
            return []
        return [self.readout if self.readout.endswith(".json") else f"readouts/{self.readout}"]


@dataclass(frozen=True)
class Trial:
    """One strategy (or baseline), seed and fold.

    `target` has the entries target, task and classes of train.json. `sha256` covers everything that shapes its result,
    and `pretraining` what shapes its pretraining, "" without one.
    """

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
    target: Mapping[str, Any]
    directory: str
    atlas: str
    pretraining: str
    sha256: str


def is_finished(trial: Trial) -> bool:
    """Whether the trial's result is there and was made with what shapes the trial now."""
    record = _record(trial)
    return record is not None and record["sha256"] == trial.sha256 and record["finished"]


def _record(trial: Trial) -> dict | None:
    path = Path(trial.folder) / "trial.json"
    return json.loads(path.read_text()) if path.is_file() else None


def run_trial(trial: Trial) -> None:
    """Run the stages of one trial that are not done, then gather its scores, subjects and learning curves.

    Raises:
        InputError: another process is running it, or a stage did not finish.
    """
    with locked(Path(f"{trial.folder}.lock")) as lock:
        if not is_finished(trial):  # another process may have finished it since the plan was made
            _run_locked(trial, lock)


def _run_locked(trial: Trial, lock: int) -> None:
    folder = Path(trial.folder)
    record = _record(trial)
    if record is not None and record["sha256"] != trial.sha256:
        logger.warning("%s was made with other settings; it is deleted and made anew", folder)
        shutil.rmtree(folder)
        record = None
    record = record or {
        "strategy": trial.strategy.name,
        "kind": "baseline" if trial.baseline else "network",
        "seed": trial.seed,
        "fold": trial.fold,
        "sha256": trial.sha256,
        "settings": asdict(trial),
        "seconds": {},
        "finished": False,
    }
    stages = _baseline_stages(trial) if trial.baseline else _stages(trial, lock)
    for name, stage in stages.items():
        if name not in record["seconds"]:
            _write(trial, record)
            started = time.monotonic()
            stage()
            record["seconds"][name] = round(time.monotonic() - started, 1)
    if not trial.baseline:
        _gather(folder)
    _write(trial, record | {"finished": True, "versions": {name: version(name) for name in PACKAGES}})


def _write(trial: Trial, record: dict) -> None:
    write_json(Path(trial.folder) / "trial.json", record)


def _baseline_stages(trial: Trial) -> dict[str, Callable[[], Any]]:
    series = Path(trial.folder).parents[1] / "series"
    name, folder = trial.strategy.baseline or trial.strategy.name, Path(trial.folder)
    settings = (trial.resamples, trial.seed, trial.target, trial.atlas, trial.strategy.harmonise)
    return {"test": partial(run_baseline, name, trial.store, trial.splits_file, folder, series, *settings)}


def _stages(trial: Trial, lock: int) -> dict[str, Callable[[], Any]]:
    """The stages of a trial in order, each of which runs one process."""
    folder, common, pretraining = Path(trial.folder), _options(trial), pretraining_options(trial)
    encoder = "random" if trial.strategy.mask is None else folder / "pretrain" / "best.pt"
    training = (
        common
        | dict(trial.target)
        | dict(trial.strategy.train)
        | {"output_dir": folder / "train", "encoder_checkpoint": encoder}
    )
    masks, overlays = trial.strategy.overlays, trial.configs
    jobs: dict[str, tuple[str, list[str], dict]] = {}
    shared: dict[str, tuple[str, list[str], dict]] = {}
    if trial.strategy.mask is not None:
        shared["pretrain"] = ("pretrain", ["pretrain", *masks, *overlays], pretraining)
        if "reconstruct" in trial.steps:
            shared["reconstruct"] = ("run", ["pretrain", *masks, "reconstruct", *overlays], pretraining)
    train = ["train", *trial.strategy.readouts]
    jobs["train"] = ("run", [*train, *overlays], training)
    jobs["test"] = ("run", [*train, "evaluate", *overlays], training)
    if "attribute" in trial.steps:
        jobs["attribute"] = ("run", [*train, "attribute", *overlays], training)
    log = folder / "log.txt"
    stages: dict[str, Callable[[], Any]] = {n: partial(_share, trial, n, job, log) for n, job in shared.items()}
    return stages | {n: partial(run_config, *job, log, lock, trial.directory) for n, job in jobs.items()}


def _options(trial: Trial) -> dict[str, Any]:
    """Of all stages."""
    given = {"dataset_dir": trial.store, "splits_file": trial.splits_file, "seed": trial.seed} | dict(trial.overrides)
    return given | {"bootstrap_resamples": trial.resamples}


def pretraining_options(trial: Trial) -> dict[str, Any]:
    """What a trial's pretraining is run with, and what looks at it afterwards has to be."""
    return _options(trial) | dict(trial.strategy.pretrain) | {"output_dir": Path(trial.folder) / "pretrain"}


def _share(trial: Trial, name: str, job: tuple[str, list[str], dict], log: Path) -> None:
    """Run a stage of the pretraining that a trial shares, unless it is done; wait where another trial is at it."""
    link = Path(trial.folder) / "pretrain"
    target = Path(trial.folder).parents[1] / "pretrainings" / trial.pretraining
    target.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..", "..", "pretrainings", trial.pretraining), target_is_directory=True)
    with locked(Path(f"{target}.lock"), patience_s=math.inf) as lock:
        done = target / f"{name}.done"
        if not done.is_file():
            run_config(*job, log, lock, trial.directory)
            done.touch()


def _gather(folder: Path) -> None:
    """Bring what the report needs to the top of the trial's folder, and drop checkpoints only a resume needs."""
    for name in ("scores.json", "subjects.tsv"):
        shutil.copy(folder / "train" / "evaluation" / name, folder / name)
    write_text(folder / "curves.tsv", learning_curves(folder).to_csv(sep="\t", index=False))
    for stage in ("pretrain", "train"):
        (folder / stage / "last.pt").unlink(missing_ok=True)


def learning_curves(folder: Path) -> pd.DataFrame:
    """Scalars that the stages wrote to TensorBoard: `stage`, `tag`, `step`, `value`, in order."""
    rows = []
    for stage in ("pretrain", "train"):
        if (folder / stage / "tensorboard").is_dir():
            events = EventAccumulator(str(folder / stage / "tensorboard"), size_guidance={"scalars": 0, "images": 1})
            events.Reload()
            for tag in events.Tags()["scalars"]:
                rows += [(stage, tag, event.step, event.value) for event in events.Scalars(tag)]
    table = pd.DataFrame(rows, columns=["stage", "tag", "step", "value"])
    return table.drop_duplicates(["stage", "tag", "step"], keep="last")  # a resumed epoch is written twice
