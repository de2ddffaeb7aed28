"""What metrics read from the output of MONAI's engines."""

from collections.abc import Callable

import torch
from ignite.metrics import Metric
from torch import Tensor


def prediction_and_target(output: dict) -> tuple[Tensor, dict]:
    """Pick what the metrics here need from the output of a MONAI engine that does not decollate."""
    return output["pred"], output["label"]


class EngineMetric(Metric):
    """A metric that reads the output of a MONAI engine by default."""

    def __init__(self, output_transform: Callable = prediction_and_target, device: str | torch.device = "cpu") -> None:
        super().__init__(output_transform=output_transform, device=device)
