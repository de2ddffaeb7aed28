"""Checkpoints: written atomically, resumed only under the same settings, loaded without running code."""

import hashlib
import io
import json
import logging
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint
from monai.engines import Trainer
from torch import nn

from bundle.errors import InputError
from bundle.files import WriteError, clean_unfinished, write_bytes
from bundle.training.distributed import leave_group, lost_process
from bundle.training.provenance import TRAINING_ONLY, Provenance, entries
from bundle.training.signals import StopSignals, end_now

logger = logging.getLogger(__name__)

RESUME = "last.pt is written; the same command goes on from there"

PUBLISHED_SAYS_NOTHING = ("normalisation#sd_floor", "normalisation#clip")
"""Of what published weights, which have seen z over the run, know nothing."""


class KeepCheckpoints:
    """Trainer's handler: resume from `last.pt` if there is one, then keep `last.pt` and `best.pt`.

    `last.pt` is replaced, atomically,

    - at the end of each epoch, after `best.pt`, so that a kill between the two loses neither;
    - every so many minutes, after an iteration; the disk is waited for in the background;
    - at SIGTERM or SIGUSR1, after the iteration of that moment, which all processes end together. Then the process ends
      with status 128 + signal: 143 or 138. While an epoch is being validated, what is written is the state before that,
      and the validation is done when training is resumed;
    - where a batch cannot be read.

    Weights that are not finite are never written. What is drawn depends on (seed, epoch, item) alone (see
    `bundle.data.batches`), so that no generator is saved. Attach it after the validation handler, so that the epoch's
    validation metric is known.

    Args:
        folder: where the checkpoints lie; made if absent.
        objects: what to save and resume, name to object with `state_dict` and `load_state_dict`.
        provenance: saved with them, and compared before anything is resumed.
        metric: returns the epoch's validation metric.
        lower_is_better: how `best.pt` is chosen.
        patience: stop after so many epochs in a row without a better metric; 0 never stops early.
        minutes: at most so long after the last one an iteration is followed by a checkpoint.

    Raises:
        InputError: (in training) `last.pt` was made with other settings or differs between processes; weights are not
            finite; or a checkpoint cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        objects: Mapping[str, Any],
        provenance: Provenance,
        metric: Callable[[], float],
        lower_is_better: bool,
        patience: int = 0,
        minutes: float = 10.0,
    ) -> None:
        self.folder = Path(folder)
        self.objects = dict(objects) | {"provenance": provenance, "best": self}
        self.provenance = provenance
        self.metric = metric
        self.sign = -1.0 if lower_is_better else 1.0
        self.patience = patience
        self.seconds = 60 * minutes
        self.best = -float("inf")
        self.best_epoch = 0
        self.completed = 0  # epochs that are validated
        self._in_step = True
        self._unvalidated: dict[str, Any] | None = None  # state at the end of an epoch, while it is validated
        self._disk = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._signals = StopSignals()

    def attach(self, engine: Trainer) -> None:
        """Register with a trainer."""
        self.objects["trainer"] = engine
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.wait)  # no thread writes while workers are forked
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.enter_step)  # then the iteration is counted
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.leave_step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.rescue)

    def state_dict(self) -> dict[str, float]:
        """Best validation metric so far, larger is better, and its epoch; epochs that are complete, with validation."""
        return {"metric": self.best, "epoch": self.best_epoch, "completed": self.completed}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.best, self.best_epoch, self.completed = state["metric"], int(state["epoch"]), int(state["completed"])

    def start(self, engine: Trainer) -> None:
        """Resume, and listen to signals."""
        if idist.get_rank() == 0:
            clean_unfinished(self.folder)
        self.resume(engine)
        self._in_step = False
        self._saved(engine)
        engine.state.stop_signal = 0  # what this process was asked
        engine.state.stop = False  # what all processes have agreed on, see `WholeBatchStep`
        self._signals.listen(partial(self._asked_to_stop, engine))

    def resume(self, engine: Trainer) -> None:
        """Load `last.pt` where it exists, refusing one that was made with other settings."""
        path = self.folder / "last.pt"
        if path.is_file():
            saved = load_checkpoint(path)
            self.provenance.require(saved_facts(saved, path), path)
            max_epochs = engine.state.max_epochs
            Checkpoint.load_objects(to_load=self.objects, checkpoint=saved, strict=True)
            engine.state.max_epochs = max_epochs  # what is asked for now, not what was when it was interrupted
        places: Any = idist.all_gather(engine.state.iteration)
        if len(set(places)) > 1:
            raise InputError(f"{path} is not the same file for all processes; give a folder that all of them share")
        if not engine.state.iteration:
            logger.info("No checkpoint in %s: training starts from the first epoch", self.folder)
            return
        step = engine.state.iteration % engine.state.epoch_length
        place = f"after {engine.state.epoch} epochs" + (f" and {step} iterations" if step else "")
        logger.info("Resumed %s, of %s epochs, from %s", place, engine.state.max_epochs, path)
        if self.completed < engine.state.epoch:  # it was stopped while the epoch was validated
            engine.add_event_handler(Events.STARTED, self._complete_epoch)  # after all other handlers have started

    def _complete_epoch(self, engine: Trainer) -> None:
        if self.completed < engine.state.epoch:
            self._unvalidated = state_of(self.objects)
            engine.fire_event(Events.EPOCH_COMPLETED)

    def enter_step(self) -> None:
        """From here on weights may be half-way."""
        self._in_step = True

    def leave_step(self, engine: Trainer) -> None:
        """Write `last.pt` where it is time; stop where that was asked for."""
        self._in_step = False
        if engine.state.iteration % engine.state.epoch_length == 0:
            self._unvalidated = state_of(self.objects)  # weights stay while the epoch is validated
        if engine.state.stop if idist.get_world_size() > 1 else engine.state.stop_signal:
            self._stop(engine)
        elif engine.state.stop_signal and self._unvalidated is not None:  # after the last agreement of the epoch
            self._asked_to_stop(engine, engine.state.stop_signal)
        elif time.monotonic() - self.saved_s >= self.seconds and idist.get_rank() == 0:
            self._require_finite(engine)
            self.wait()
            content = checkpoint_bytes(state_of(self.objects))
            self._writing = self._disk.submit(write_bytes, self.folder / "last.pt", content)
            self._saved(engine)

    def save(self, engine: Trainer) -> None:
        """Write, where the validation metric is the best so far, `best.pt`, and then `last.pt`."""
        self._require_finite(engine)
        score = self.sign * self.metric()
        improved = score > self.best or not (self.folder / "best.pt").is_file()
        if score > self.best:  # false for NaN: an undefined metric is never the best
            self.best, self.best_epoch = score, engine.state.epoch
        self.completed = engine.state.epoch
        names = ["best.pt", "last.pt"] if improved else ["last.pt"]
        if idist.get_rank() == 0:
            self.wait()
            for name in names:
                save_checkpoint(self.objects, self.folder / name)
        self._unvalidated = None
        self._saved(engine)
        logger.info("Epoch %d: wrote %s to %s", engine.state.epoch, " and ".join(names), self.folder)
        if self.patience and engine.state.epoch - self.best_epoch >= self.patience:
            logger.info("No better validation metric for %d epochs: training stops early", self.patience)
            engine.terminate()

    def wait(self) -> None:
        """Wait until the disk has what is being written.

        Raises:
            WriteError: it cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def finish(self) -> None:
        """Training has ended."""
        self._signals.restore()
        self.wait()

    def rescue(self, engine: Trainer, error: BaseException) -> None:
        """Training ends early: where that is not in the middle of a step, nothing that was learnt is lost."""
        with suppress(WriteError):  # the error that is on its way says more
            self.wait()
        safe = not self._in_step and isinstance(error, Exception) and not isinstance(error, WriteError)
        try:
            if safe and engine.state.iteration > self.saved_iteration:
                self._write(engine)
        finally:
            self._signals.restore()
        raise lost_process(error)

    def _saved(self, engine: Trainer) -> None:
        self.saved_s, self.saved_iteration = time.monotonic(), engine.state.iteration

    def _write(self, engine: Trainer) -> None:
        """Write the state from which training can go on."""
        self._signals.ignore()  # a second one must not end what the first one began
        self._require_finite(engine)
        if idist.get_rank() == 0:
            with suppress(WriteError):  # of an older state; else this one says it again
                self.wait()
            write_checkpoint(self._unvalidated or state_of(self.objects), self.folder / "last.pt")
            logger.info("Wrote last.pt to %s", self.folder)
        self._saved(engine)

    def _asked_to_stop(self, engine: Trainer, number: int) -> None:
        """A signal has come: stop after this iteration, or at once where the epoch is being validated."""
        engine.state.stop_signal = number
        if self._unvalidated is not None and not self._in_step:
            self._write(engine)
            end_now(number, f"stopped while epoch {engine.state.epoch} was validated; {RESUME}")

    def _stop(self, engine: Trainer) -> None:
        number = engine.state.stop_signal or signal.SIGTERM  # another process was asked
        self._write(engine)
        self._signals.restore()
        logger.info("%s: stopped after iteration %d; %s", signal.Signals(number).name, engine.state.iteration, RESUME)
        if idist.get_world_size() > 1:
            leave_group()
        raise SystemExit(128 + number)

    def _require_finite(self, engine: Trainer) -> None:
        """Refuse weights that are NaN or infinite, as they would replace good ones."""
        for figures in getattr(engine.state, "figures", ())[-1:]:
            figures.require_finite()
        for name, thing in self.objects.items():
            if isinstance(thing, nn.Module) and not all(bool(tensor.isfinite().all()) for tensor in thing.parameters()):
                raise InputError(
                    f"the weights of {name} are not finite in iteration {engine.state.iteration}; {self.folder} keeps "
                    "the last good checkpoint; lower learning_rate and give another --output_dir"
                )


def state_of(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The `state_dict` of each object; data-parallel wrappers are taken off."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    bare = {name: thing.module if isinstance(thing, wrappers) else thing for name, thing in objects.items()}
    return {name: thing.state_dict() for name, thing in bare.items()}


def save_checkpoint(objects: Mapping[str, Any], path: str | Path) -> None:
    """Write the `state_dict` of each object to one file, atomically; data-parallel wrappers are taken off."""
    write_checkpoint(state_of(objects), Path(path))


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values to one file, atomically.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    write_bytes(path, checkpoint_bytes(state))


def checkpoint_bytes(state: Mapping[str, Any]) -> bytes:
    """A checkpoint as it will lie on the disk; what becomes of the state afterwards does not change it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def weights_sha256(state: Mapping[str, Any]) -> str:
    """Hash of a network's state dict, whatever file it is in: of all names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(entries(dict(state))):
        is_tensor = isinstance(value, torch.Tensor)
        digest.update(f"{name} {(value.dtype, tuple(value.shape)) if is_tensor else value!r}\n".encode())
        if is_tensor:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
