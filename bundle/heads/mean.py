"""A light head on a frozen encoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bundle.errors import InputError
from bundle.heads.on_encoder import OnEncoder


class Classifier(OnEncoder):
    """Score each clip: the mean of the encoder's tokens, standardised, then one linear layer.

    What its outputs are, the task says: of two classes one logit, whose sigmoid is the probability. (A softmax over one
    logit is always 1.)

    Standardising each feature over the training clips, by a batch norm without weights, is how linear probes of
    masked autoencoders are trained (He et al. 2022, arXiv 2111.06377, appendix A.1). It matters: features of
    different sites differ so much that without it the unit hardly learns anything else.

    Args:
        freeze: keep the encoder as it is: no gradients, always in evaluation mode. Else it is trained as well.
        outputs: numbers per clip, see `bundle.tasks.task.Task`.
        hidden: units of a hidden layer between features and outputs; None: there is none.
        **encoder: the arguments of `SwinMambaEncoder`.
    """

    def __init__(self, freeze: bool = True, outputs: int = 1, hidden: int | None = None, **encoder: Any) -> None:
        super().__init__(freeze, outputs, **encoder)
        channels = self.encoder.channels
        self.head: nn.Module = nn.Linear(channels, outputs)
        if hidden is not None:
            self.head = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, outputs))

    def features(self, image: Tensor) -> Tensor:
        """Map images (B, 1, X, Y, Z, T) to the mean over their tokens (B, c)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return self.encoder(image).mean(dim=(2, 3, 4, 5))

    def forward(self, image: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Map images (B, 1, X, Y, Z, T), or their `features` (B, c), to outputs (B, k).

        Raises:
            InputError: `counts` say that these are clips of whole runs.
        """
        if counts is not None:
            raise InputError("this readout scores single clips; set whole_runs false, or give one of configs/readouts")
        features = image if image.ndim == 2 else self.features(image)
        return self.head(self.norm(features))
