"""A light classification head on a frozen encoder."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from bundle.networks.swin_mamba import SwinMambaEncoder


class Classifier(nn.Module):
    """Score each clip: the mean of the encoder's tokens, then one linear unit.

    The result is one logit per clip for "case": its sigmoid is the probability. (A softmax over one logit is
    always 1.)

    Args:
        freeze: keep the encoder as it is: no gradients, always in evaluation mode. Else it is trained as well.
        **encoder: the arguments of `SwinMambaEncoder`.
    """

    def __init__(self, freeze: bool = True, **encoder: Any) -> None:
        super().__init__()
        self.freeze = freeze
        self.encoder = SwinMambaEncoder(**encoder)
        self.head = nn.Linear(self.encoder.channels, 1)
        if freeze:
            self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, except for a frozen encoder."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, 1, X, Y, Z, T) to logits (B, 1)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            features = self.encoder(image)  # (B, c, x, y, z, T)
        return self.head(features.mean(dim=(2, 3, 4, 5)))
