"""Handlers that the trainers attach beside MONAI's and Ignite's own."""

import logging
import time

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import Trainer
from torch.utils.tensorboard import SummaryWriter

from bundle.data.batches import seed_of
from bundle.training.steps import Figures, readable

logger = logging.getLogger(__name__)


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
                self.writer.add_scalar("iteration_loss", loss, figures.iteration)
                self.writer.add_scalar("gradient_norm", norm, figures.iteration)
                self.written = figures.iteration


class DataWaiting:
    """Log the share of each epoch that the trainer spent waiting for data.

    Near 0 the loader keeps up; else more workers help. Attach it before handlers that validate at the end of an
    epoch, which would be counted as training time.
    """

    def attach(self, engine: Trainer) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self.start_epoch)  # of an epoch its validation alone may be left
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.start_waiting)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.stop_waiting)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.report)

    def start_epoch(self) -> None:
        """Begin to count."""
        self.epoch_start = self.wait_start = time.perf_counter()
        self.waited = 0.0

    def start_waiting(self) -> None:
        """The trainer asks for a batch."""
        self.wait_start = time.perf_counter()

    def stop_waiting(self) -> None:
        """The trainer has its batch."""
        self.waited += time.perf_counter() - self.wait_start

    def report(self, engine: Trainer) -> None:
        """Log the epoch's figures, and keep the share in `share`."""
        seconds = time.perf_counter() - self.epoch_start
        self.share = self.waited / seconds
        logger.info(
            "epoch %d: %.1f s, of which %.0f %% waiting for data",
            engine.state.epoch,
            seconds,
            100 * self.share,
        )
