"""Handlers that the trainers attach beside MONAI's and Ignite's own."""

import logging
import resource
import sys
import time

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Trainer
from torch.utils.tensorboard import SummaryWriter

from bundle.data.batches import seed_of
from bundle.training.steps import Figures, readable

logger = logging.getLogger(__name__)

OF_STEPS = ("iteration_loss", "gradient_norm")
"""Scalars on TensorBoard that count steps; all others count epochs."""


class DrawByPlace:
    """Make everything random a function of the seed and the place in training, never of what was drawn before.

    At the start of an epoch, and where one is resumed in the middle, the loader's `EvenBatches` are told which batches
    to give; order, and the seeds of all transforms, follow from that. At each iteration torch's global generator is
    seeded, for whatever the network draws.

    Args:
        seed: the training's seed; the loader has the same.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Trainer) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.begin_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self.begin_iteration)

    def begin_epoch(self, engine: Trainer) -> None:
        """Set the batches that are left of the epoch."""
        first = engine.state.iteration % engine.state.epoch_length
        engine.state.dataloader.batch_sampler.begin(engine.state.epoch, first)

    def begin_iteration(self, engine: Trainer) -> None:
        """Seed torch, differently in each process."""
        torch.manual_seed(seed_of(self.seed, engine.state.iteration, idist.get_rank()))


class StepScalars:
    """Write the loss and the norm of the gradient of each step to TensorBoard, without waiting for the device.

    Args:
        writer: TensorBoard writer.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer
        self.written = 0

    def attach(self, engine: Trainer) -> None:
        """Register with a trainer, whose steps are those of `WholeBatchStep`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: self.write(readable(engine)))
        engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine: self.write(getattr(engine.state, "figures", []))
        )

    def write(self, known: list[Figures]) -> None:
        """Write the figures of steps, each once; an epoch of which only the validation was left to do has none."""
        for figures in known:
            if figures.iteration > self.written:
                loss, norm, *_ = figures.read()
                for name, value in zip(OF_STEPS, (loss, norm), strict=True):
                    self.writer.add_scalar(name, value, figures.iteration)
                self.written = figures.iteration


class Throughput:
    """Metrics of each epoch of a training that say how fast it is, for the log and all trackers.

    `clips_per_second`, of all processes; `waiting_for_data`, the share of the time that the trainer waited for batches
    (near 0 the loader keeps up, else more workers help); `memory_gib`, the most so far on the GPU, or without one of
    this process; and `hours_left` until the last epoch, with validations. Attach it before handlers that validate at
    the end of an epoch, which would be counted as training time.
    """

    def attach(self, engine: Trainer) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_waiting)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.stop_waiting)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.report)

    def start(self) -> None:
        """Begin to count; of an epoch that is resumed its validation alone may be left."""
        self.begun = time.perf_counter()
        self.steps = 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Begin to count an epoch."""
        self.epoch_start = self.wait_start = time.perf_counter()
        self.waited = 0.0
        self.clips = 0

    def start_waiting(self) -> None:
        """The trainer asks for a batch."""
        self.wait_start = time.perf_counter()

    def stop_waiting(self, engine: Trainer) -> None:
        """The trainer has its batch."""
        self.waited += time.perf_counter() - self.wait_start
        self.clips += len(engine.state.batch) * idist.get_world_size()
        self.steps += 1

    def report(self, engine: Trainer) -> None:
        """Add the metrics of the epoch; there are none where only its validation was left."""
        if self.clips:
            now = time.perf_counter()
            left = engine.state.max_epochs * engine.state.epoch_length - engine.state.iteration
            engine.state.metrics |= {
                "clips_per_second": self.clips / (now - self.epoch_start),
                "waiting_for_data": self.waited / (now - self.epoch_start),
                "memory_gib": _peak_bytes() / 2**30,
                "hours_left": (now - self.begun) / self.steps * left / 3600,
            }


class SayIfFlat:
    """At the end of a pretraining, warn if its last validation rebuilt no course better than a flat line would.

    That is a plateau of the loss on which pretraining starts, and which it may never leave (docs/dynamics.md).

    Args:
        validator: has the metric `val_temporal_r2`.
    """

    LEAST = 0.01

    def __init__(self, validator: Engine) -> None:
        self.validator = validator

    def attach(self, engine: Trainer) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.COMPLETED, self.say)

    def say(self) -> None:
        """Warn; not where training was complete before, and so nothing was validated."""
        score = self.validator.state.metrics.get("val_temporal_r2")
        if score is not None and score < self.LEAST:
            logger.warning(
                "val_temporal_r2 is %.3f: hidden voxels are rebuilt no better over time than by a flat line. Train for "
                "longer or with another --seed, with --normalisation#mode voxel and configs/masks/region_tubes.json "
                "(docs/dynamics.md)",
                score,
            )


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
