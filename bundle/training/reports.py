"""What trainers and validators say while they work: progress, log and TensorBoard; nothing here changes a result."""

from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.handlers import StatsHandler, TensorBoardStatsHandler
from torch.utils.tensorboard import SummaryWriter

from bundle.training.handlers import SayIfFlat, StepScalars, Throughput
from bundle.training.pictures import ReconstructionImages


class EpochStats(StatsHandler):
    """MONAI's, for epochs only; it leaves errors alone, which it would log with a traceback and raise by itself."""

    def __init__(self, tag_name: str) -> None:
        super().__init__(tag_name=tag_name, output_transform=lambda output: None)

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        self.logger = engine.logger
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)


def training_reports(description: str, writer: SummaryWriter | None, rebuilding: Engine | None = None) -> list[Any]:
    """Handlers of a trainer: a bar, speed and epochs in the log, and in TensorBoard each step's loss, too.

    With the validator of a pretraining, `rebuilding`, also a warning where nothing is rebuilt at the end.

    They come before the trainer's other handlers, so that validation does not count as waiting. Of several processes
    the first one reports.
    """
    if writer is None:
        return []
    reports = [
        ProgressBar(desc=description),
        Throughput(),
        EpochStats("train"),
        StepScalars(writer),
        epochs_to(writer),
    ]
    return reports if rebuilding is None else [*reports, SayIfFlat(rebuilding)]


def validation_reports(writer: SummaryWriter | None, pictures: bool = False) -> list[Any]:
    """Handlers of a validator: its metrics in the log and in TensorBoard, with pictures of reconstructions if asked."""
    if writer is None:
        return []
    reports: list[Any] = [EpochStats("val"), epochs_to(writer)]
    return [*reports, ReconstructionImages(writer)] if pictures else reports


def epochs_to(writer: SummaryWriter) -> TensorBoardStatsHandler:
    """The metrics of each epoch to TensorBoard."""
    return TensorBoardStatsHandler(summary_writer=writer, iteration_log=False, output_transform=lambda output: None)
