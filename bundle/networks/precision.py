"""Numerical precision of a network: one switch for training, validation, test and service, on every device."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from bundle.errors import InputError

PRECISIONS = ("float32", "bf16")


def best_device() -> torch.device:
    """CUDA where there is one, as the configs' `device`."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Context in which a network computes: "bf16" (mixed, weights stay float32) or "float32" throughout."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class PrecisionInferer(Inferer):
    """Run a network in one precision.

    MONAI's engines know mixed precision on CUDA only, and only for the calls that they make themselves. A model that
    was trained in bf16 on a GPU would be served in float32 on a CPU, and a frozen encoder's features be made in
    another precision than the one that they are served in. bfloat16 has float32's range, so no loss is scaled.

    Args:
        precision: "float32" or "bf16".

    Raises:
        InputError: another precision.
    """

    def __init__(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.precision = precision

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Return `network(inputs, ...)`; half-precision results are left to the loss to widen."""
        with autocast(self.precision, inputs.device):
            return network(inputs, *args, **kwargs)
