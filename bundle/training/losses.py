"""Training losses."""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


def masked_mse(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over masked voxels, at every frame they are masked in.

    Args:
        prediction: reconstruction ``(B, 1, X, Y, Z, T)``.
        image: target of the same shape, z-scored BOLD (no unit).
        mask: bool, ``(B, 1, X, Y, Z)`` for tube masks (all frames) or ``(B, 1, X, Y, Z, T)``.

    Returns:
        A scalar: the sum of squared errors at masked places over their number.
    """
    squared, count = masked_squared_error(prediction, image, mask)
    return squared / count


def masked_squared_error(prediction: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """Sum of squared errors over masked places, in float32, and the number of those places."""
    # a tube mask (B, 1, X, Y, Z) takes whole time courses, (voxels, T): no index per frame is made
    error = prediction[mask].float() - image[mask].float()
    if error.numel() == 0:
        raise ValueError("the mask hides no voxel, so there is nothing to reconstruct")
    return error.square().sum(), error.numel()


class MaskedMSELoss(nn.Module):
    """`masked_mse` in the form of a trainer's loss: ``target`` holds ``image`` and ``mask``."""

    def forward(self, prediction: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Return the scalar loss of ``prediction`` ``(B, 1, X, Y, Z, T)``."""
        return masked_mse(prediction, target["image"], target["mask"])


class CaseControlLoss(nn.Module):
    """Binary cross-entropy of one logit per clip; ``target["label"]`` is 1 for cases and 0 for controls."""

    def forward(self, logit: Tensor, target: dict[str, torch.Tensor]) -> Tensor:
        """Return the scalar loss of ``logit`` ``(B, 1)``."""
        return binary_cross_entropy_with_logits(logit.float(), target["label"].float())
