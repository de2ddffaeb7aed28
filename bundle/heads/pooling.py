"""From a grid of tokens to parcels of an atlas."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bundle.anatomy import grid
from bundle.anatomy.atlas import load_atlas
from bundle.anatomy.parcels import parcel_index, parcels_of
from bundle.errors import InputError

LEVELS = ("label", "group")


def token_shares(atlas: str | Path | None, level: str, patch_size: int, image_size: Sequence[int]) -> Tensor:
    """Share of each parcel's volume that lies in each token.

    Args:
        atlas: label image; None: AAL3v1, 1 mm.
        level: "label" (each label by itself) or "group" (the seven regions and the insula).
        patch_size: edge of a token in voxels; each merging of patches doubles it.
        image_size: voxels along x, y and z; those of the fixed grid, on which the parcels lie.

    Returns:
        float32 (P, tokens), tokens in raster order, z fastest; each row sums to 1. Parcels without a voxel of the
        grid are left out.

    Raises:
        InputError: there is no such level, the images are not on the grid, or tokens do not fill it.
    """
    if level not in LEVELS:
        raise InputError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    if tuple(image_size) != grid.SHAPE or any(size % patch_size for size in image_size):
        raise InputError(
            f"parcels are pooled over tokens that fill the grid of {grid.SHAPE} voxels, not {tuple(image_size)} voxels "
            f"in tokens of {patch_size}"
        )
    loaded = load_atlas(atlas)
    parcels = parcels_of(loaded, level)
    counts = [size // patch_size for size in image_size]
    x, y, z = np.indices(grid.SHAPE) // patch_size
    token = (x * counts[1] + y) * counts[2] + z
    both = parcel_index(loaded, parcels) * np.prod(counts) + token
    volumes = np.bincount(both.ravel(), minlength=(len(parcels) + 1) * np.prod(counts))
    volumes = volumes.reshape(len(parcels) + 1, -1)[1:]  # the first row is of no parcel
    volumes = volumes[volumes.any(axis=1)]
    return torch.from_numpy(volumes / volumes.sum(axis=1, keepdims=True)).float()


def pool(tokens: Tensor, shares: Tensor) -> Tensor:
    """Average tokens (b, x, y, z, t, c) over parcels, in float32, by shares (P, x * y * z): (b, t, P, c)."""
    with torch.autocast(tokens.device.type, enabled=False):
        return torch.einsum("pn,bntc->btpc", shares, tokens.float().flatten(1, 3))
