"""What trainers and validators say while they work: progress, log and TensorBoard; nothing here changes a result."""

from typing import Any

from ignite.handlers import ProgressBar
from monai.handlers import StatsHandler, TensorBoardStatsHandler
from torch.utils.tensorboard import SummaryWriter

from bundle.training.handlers import DataWaiting
from bundle.training.pictures import ReconstructionImages


def training_reports(description: str, writer: SummaryWriter) -> list[Any]:
    """Handlers of a trainer: a bar, the share of waiting for data, epochs in the log, each step's loss in TensorBoard.

    They come before the trainer's other handlers, so that validation does not count as waiting.
    """
    return [
        ProgressBar(desc=description),
        DataWaiting(),
        StatsHandler(tag_name="train", iteration_log=False, output_transform=lambda output: None),
        TensorBoardStatsHandler(
            summary_writer=writer, tag_name="iteration_loss", output_transform=lambda output: output["loss"].item()
        ),
    ]


def validation_reports(writer: SummaryWriter, pictures: bool = False) -> list[Any]:
    """Handlers of a validator: its metrics in the log and in TensorBoard, with pictures of reconstructions if asked."""
    reports: list[Any] = [
        StatsHandler(tag_name="val", iteration_log=False, output_transform=lambda output: None),
        TensorBoardStatsHandler(summary_writer=writer, iteration_log=False, output_transform=lambda output: None),
    ]
    return [*reports, ReconstructionImages(writer)] if pictures else reports
