"""Training losses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.anatomy.grid import AFFINE
from bundle.anatomy.parcels import region_index
from bundle.errors import InputError


def masked_mse(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over masked voxels, at every frame they are masked in.

    Args:
        prediction: reconstruction `(B, 1, X, Y, Z, T)`.
        image: target of the same shape, z-scored BOLD (no unit).
        mask: bool, `(B, 1, X, Y, Z)` for tube masks (all frames) or `(B, 1, X, Y, Z, T)`.

    Returns:
        A scalar: the sum of squared errors at masked places over their number; NaN where there is none.
    """
    squared, count = masked_squared_error(prediction, image, mask)
    return squared / count


def masked_squared_error(prediction: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared errors over masked places, in float32, and the number of those places; both on the device."""
    places = with_frames(mask, image)
    count = places.sum() * (image.numel() // places.numel())
    return _MaskedSquares.apply(prediction, image, places), count


def with_frames(mask: Tensor, image: Tensor) -> Tensor:
    """A mask of an image `(B, 1, X, Y, Z, T)` with an axis of frames: 1 long where it holds for all of them, else T."""
    return mask if mask.ndim == image.ndim else mask.unsqueeze(-1)


class _MaskedSquares(torch.autograd.Function):
    """Sum of squared differences where a mask (broadcast over frames) is true.

    Dense: to pick the masked places by index, the host has to wait until the device has counted them. And nothing is
    kept for the backward pass but the arguments, which exist anyway.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(prediction, image, mask)
        return _masked_difference(prediction, image, mask).square_().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        prediction, image, mask = ctx.saved_tensors
        return _masked_difference(prediction, image, mask).mul_(2 * gradient).to(prediction.dtype), None, None


def _masked_difference(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    return (prediction.float() - image.float()).masked_fill_(~mask, 0.0)  # a product would keep NaN


class MaskedMSELoss(nn.Module):
    """`masked_mse` in the form of a trainer's loss: `target` holds `image` and `mask`."""

    def forward(self, prediction: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Return the scalar loss of `prediction` `(B, 1, X, Y, Z, T)`."""
        return masked_mse(prediction, target["image"], target["mask"])

    def denominator(self, target: dict[str, Tensor]) -> Tensor:
        """What the loss is a mean over: the number of masked voxels, times the frames they are masked in."""
        return target["mask"].sum() * (target["image"].numel() // target["mask"].numel())


class RegionWeightedMSELoss(nn.Module):
    """Mean squared error over masked voxels, each weighted by its region.

    Args:
        weights: region to weight, positive; voxels of no named region weigh 1. `"balanced"`: each of the atlas's
            groups weighs the same as a whole, however many voxels it has, and so do the voxels outside them.
        atlas: see `bundle.anatomy.atlas.load_atlas`.

    Raises:
        InputError: a weight that is not positive, or an unknown region.
    """

    voxel_weight: Tensor  # (1, 1, X, Y, Z, 1)

    def __init__(self, weights: Mapping[str, float] | str, atlas: str | Path = AAL3) -> None:
        super().__init__()
        if weights != "balanced" and (isinstance(weights, str) or not all(w > 0 for w in weights.values())):
            raise InputError(f"weights must be 'balanced' or positive numbers by region, not {weights!r}")
        loaded = load_atlas(atlas)
        named = list(loaded.groups if isinstance(weights, str) else weights)
        index = torch.from_numpy(region_index(named, loaded))
        if isinstance(weights, str):
            table = 1 / torch.bincount(index.flatten(), minlength=len(named) + 1)
        else:
            table = torch.tensor([1.0, *weights.values()])
        self.register_buffer("voxel_weight", table[index].float()[None, None, ..., None], persistent=False)

    def forward(self, prediction: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Return the scalar loss of `prediction` `(B, 1, X, Y, Z, T)` on the fixed grid.

        Raises:
            InputError: the clips were moved off the grid, so that the weights would lie on other voxels.
        """
        if "affine" in target and not np.allclose(target["affine"].numpy(), AFFINE, rtol=0, atol=1e-4):
            raise InputError(
                "loss: the regions' weights lie on the fixed grid, but augmentation has moved a clip; set "
                "augment#rotate, augment#translate and augment#scale to 0, or take a loss without weights"
            )
        squared = (prediction.float() - target["image"].float()).square()
        return (self._weight(target) * squared).sum() / self.denominator(target)

    def denominator(self, target: dict[str, Tensor]) -> Tensor:
        """What the loss is a mean over: the sum of the weights of masked voxels at the frames they are masked in."""
        return self._weight(target).expand_as(target["image"]).sum()

    def _weight(self, target: dict[str, Tensor]) -> Tensor:
        """(B, 1, X, Y, Z, 1 or T), 0 where nothing is masked."""
        mask = with_frames(target["mask"], target["image"])
        return self.voxel_weight.to(mask.device) * mask
