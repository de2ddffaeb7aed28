"""Handlers that the trainers attach beside MONAI's and Ignite's own."""

import logging
import time
from collections.abc import Sequence

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from torch.utils.data import DistributedSampler

from bundle.data.batches import reseed

logger = logging.getLogger(__name__)


class ReseedEachEpoch:
    """Seed all random transforms at the start of each epoch, differently per epoch and rank.

    A resumed training then draws the same clips and masks as one that was never interrupted.

    Args:
        transforms: the transforms of the loader's dataset and of the batch preparation.
        seed: the training's seed.
    """

    def __init__(self, transforms: Sequence[object], seed: int) -> None:
        self.transforms = list(transforms)
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Reseed for the epoch that starts."""
        entropy = np.random.SeedSequence([self.seed, engine.state.epoch, idist.get_rank()])
        reseed(self.transforms, int(entropy.generate_state(1)[0]))
        sampler = getattr(engine.state.dataloader, "sampler", None)
        if isinstance(sampler, DistributedSampler):  # its own order depends on the epoch alone
            sampler.set_epoch(engine.state.epoch)


class DataWaiting:
    """Log the share of each epoch that the trainer spent waiting for data.

    Near 0 the loader keeps up; else more workers help. Attach it before handlers that validate at the end of an
    epoch, which would be counted as training time.
    """

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
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

    def report(self, engine: Engine) -> None:
        """Log the epoch's figures, and keep the share in `share`."""
        seconds = time.perf_counter() - self.epoch_start
        self.share = self.waited / seconds
        logger.info(
            "epoch %d: %.1f s, of which %.0f %% waiting for data",
            engine.state.epoch,
            seconds,
            100 * self.share,
        )
