"""Checkpoints: written atomically, resumed only under the same settings, loaded without running code."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn

from bundle.errors import InputError
from bundle.files import written_whole
from bundle.training.provenance import TRAINING_ONLY, Provenance

logger = logging.getLogger(__name__)

PUBLISHED_SAYS_NOTHING = ("normalisation#sd_floor", "normalisation#clip")
"""Of what published weights, which have seen z over the run, know nothing."""


class KeepCheckpoints:
    """Trainer's handler: resume from `last.pt` if there is one, then keep `last.pt` and `best.pt`.

    Both are replaced atomically at the end of each epoch. Attach it after the validation handler, so that the
    epoch's validation metric is known.

    Args:
        folder: where the checkpoints lie; made if absent.
        objects: what to save and resume, name to object with `state_dict` and `load_state_dict`.
        provenance: saved with them, and compared before anything is resumed.
        metric: returns the epoch's validation metric.
        lower_is_better: how `best.pt` is chosen.
        patience: stop after so many epochs in a row without a better metric; 0 never stops early.
    """

    def __init__(
        self,
        folder: str | Path,
        objects: Mapping[str, Any],
        provenance: Provenance,
        metric: Callable[[], float],
        lower_is_better: bool,
        patience: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.objects = dict(objects) | {"provenance": provenance, "best": self}
        self.provenance = provenance
        self.metric = metric
        self.sign = -1.0 if lower_is_better else 1.0
        self.patience = patience
        self.best = -float("inf")
        self.best_epoch = 0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        self.objects["trainer"] = engine
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def state_dict(self) -> dict[str, float]:
        """Best validation metric so far, larger is better, and its epoch."""
        return {"metric": self.best, "epoch": self.best_epoch}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.best, self.best_epoch = state["metric"], int(state["epoch"])

    def resume(self, engine: Engine) -> None:
        """Load `last.pt` where it exists, refusing one that was made with other settings."""
        path = self.folder / "last.pt"
        if not path.is_file():
            logger.info("No checkpoint in %s: training starts from the first epoch", self.folder)
            return
        saved = load_checkpoint(path)
        self.provenance.require(saved_facts(saved, path), path)
        max_epochs = engine.state.max_epochs
        Checkpoint.load_objects(to_load=self.objects, checkpoint=saved, strict=True)
        engine.state.max_epochs = max_epochs  # what is asked for now, not what was when it was interrupted
        logger.info("Resumed after epoch %d of %s from %s", engine.state.epoch, max_epochs, path)

    def save(self, engine: Engine) -> None:
        """Write `last.pt` and, where the validation metric is the best so far, `best.pt`."""
        score = self.sign * self.metric()
        improved = score > self.best or not (self.folder / "best.pt").is_file()
        if score > self.best:  # false for NaN: an undefined metric is never the best
            self.best, self.best_epoch = score, engine.state.epoch
        names = ["last.pt", "best.pt"] if improved else ["last.pt"]
        if idist.get_rank() == 0:
            for name in names:
                save_checkpoint(self.objects, self.folder / name)
        logger.info("Epoch %d: wrote %s to %s", engine.state.epoch, " and ".join(names), self.folder)
        if self.patience and engine.state.epoch - self.best_epoch >= self.patience:
            logger.info("No better validation metric for %d epochs: training stops early", self.patience)
            engine.terminate()


def save_checkpoint(objects: Mapping[str, Any], path: str | Path) -> None:
    """Write the `state_dict` of each object to one file, atomically; data-parallel wrappers are taken off."""
    write_checkpoint(
        {name: getattr(thing, "module", thing).state_dict() for name, thing in objects.items()}, Path(path)
    )


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values to one file, atomically.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    with written_whole(path) as unfinished:
        try:
            torch.save(state, unfinished)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error)) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only=True`: no code in it is run.

    Raises:
        InputError: the file is absent or is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint here; give the path of one, e.g. output/pretrain/best.pt")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a PyTorch checkpoint ({error})".splitlines()[0]) from error


def saved_facts(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the facts of a checkpoint's provenance.

    Raises:
        InputError: it has none, so it was not written by this bundle, or those of an earlier version.
    """
    if "provenance" not in checkpoint:
        raise InputError(
            f"{path}: holds no provenance, so it is not a checkpoint of this bundle; published NeuroSTORM weights "
            "go through `python -m scripts convert` first"
        )
    facts = json.loads(checkpoint["provenance"]["facts"])
    if ("config" not in facts and "published" not in facts) or "normalisation" not in facts:
        raise InputError(f"{path}: was written by an earlier version, whose settings are not all known; train it again")
    return facts


def encoder_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a checkpoint's encoder, by their names in it."""
    prefix = "encoder."
    return {k.removeprefix(prefix): v for k, v in checkpoint["network"].items() if k.startswith(prefix)}


def load_encoder(encoder: nn.Module, path: str, provenance: Provenance) -> None:
    """Load the encoder of a pretrained masked autoencoder; every key must fit.

    Args:
        encoder: the encoder to fill.
        path: checkpoint of a pretraining, or the word `random` to keep the random weights on purpose (a
            control: what pretraining is worth is the difference to it).
        provenance: of this training; the checkpoint's preparation, split and network sizes must be the same, so that
            no test subject was seen in pretraining. It is given the checkpoint's own facts, as `pretraining`.

    Raises:
        InputError: no such file, not a checkpoint of this bundle, or one that differs.
    """
    if path == "random":
        logger.warning("The encoder keeps its RANDOM weights, as asked (encoder_checkpoint is 'random')")
        return
    saved = load_checkpoint(path)
    facts = saved_facts(saved, path)
    state = encoder_weights(saved)
    compared = facts
    if provenance.facts["normalisation"]["mode"] == "both" and facts["normalisation"]["mode"] == "run":
        logger.warning("%s: has seen z over the run only; the second channel begins at zero", path)
        state["second_embedding.weight"] = torch.zeros_like(state["patch_embedding.weight"])
        changed = {"network": {"in_channels": 2}, "normalisation": {"mode": "both"}}
        compared = facts | {name: facts[name] | new for name, new in changed.items()}
    if "published" in facts:
        logger.warning("%s: published weights; which participants they have seen is not known here", path)
        provenance.require(compared, path, ["network", "normalisation"], ignore=PUBLISHED_SAYS_NOTHING)
    else:
        provenance.require(compared, path, ["preparation", "splits", "network", "normalisation"])
    encoder.load_state_dict(state, strict=True)
    provenance.facts["pretraining"] = facts
    logger.info("Loaded the encoder (%d tensors) from %s", len(state), path)


def load_network(network: nn.Module, path: str | Path, provenance: Provenance) -> None:
    """Load a whole network from a checkpoint that was made with the same facts; every key must fit.

    Raises:
        InputError: no such file, not a checkpoint of this bundle, or one that differs.
    """
    saved = load_checkpoint(path)
    facts = saved_facts(saved, path)
    known = [name for name in facts if name in provenance.facts]  # of what came before, such as pretraining, not all is
    provenance.require(facts, path, known, ignore=TRAINING_ONLY, more_is_fine=True)
    network.load_state_dict(saved["network"], strict=True)
    logger.info("Loaded %s (epoch %d)", path, saved["trainer"]["iteration"] // saved["trainer"]["epoch_length"])
