"""Heads that are fitted at once, instead of trained in steps."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.engines import Evaluator
from tqdm.auto import tqdm

from bundle.data.batches import PrepareBatch
from bundle.heads.fitted import FittedHead
from bundle.tasks.task import Task
from bundle.training.checkpoints import load_checkpoint, saved_facts, write_checkpoint
from bundle.training.provenance import Provenance

logger = logging.getLogger(__name__)


def fit_head(
    network: FittedHead,
    task: Task,
    runs: Sequence[dict[str, Any]],
    prepare_batch: PrepareBatch,
    validator: Evaluator,
    folder: str | Path,
    provenance: Provenance,
    seed: int = 0,
) -> None:
    """Fit a head to the training runs, validate it, and keep it as `best.pt` and `last.pt`, as after one epoch.

    What was fitted before under the same settings is left as it is.

    Args:
        network: encoder and head.
        task: what is predicted.
        runs: dataset of labelled whole runs.
        prepare_batch: makes features of them.
        validator: evaluator over the validation set; its key metric is kept.
        folder: of the checkpoints, such as `KeepCheckpoints` writes.
        provenance: saved with them.
        seed: of whatever is drawn.

    Raises:
        InputError: a checkpoint in the folder was made with other settings, or the head cannot be fitted.
    """
    last = Path(folder) / "last.pt"
    if last.is_file():
        provenance.require(saved_facts(load_checkpoint(last), last), last)
        logger.info("%s: fitted before, under the same settings", last)
        return
    features, labels, participants = [], [], []
    for position in tqdm(range(len(runs)), desc="features of the training set", unit="run"):
        found, target, *_ = prepare_batch([runs[position]], validator.state.device)
        features.append(found.cpu())
        labels.append(target["label"].item())
        participants += target["participant_id"]
    network.fit(features, labels, task, seed, participants)
    validator.run(1)
    state = {
        "network": network.state_dict(),
        "trainer": {"iteration": 1, "epoch_length": 1, "max_epochs": 1},
        "best": {"metric": validator.state.metrics[validator.state.key_metric_name], "epoch": 1},
        "provenance": provenance.state_dict(),
    }
    if idist.get_rank() == 0:
        for name in ("best.pt", "last.pt"):
            write_checkpoint(state, last.with_name(name))
    logger.info("Fitted to %d runs; wrote best.pt and last.pt to %s", len(runs), folder)
