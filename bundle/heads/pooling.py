"""From a grid of tokens to labels of an atlas."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas
from bundle.anatomy.parcels import parcels_of
from bundle.errors import InputError

LEVELS = ("label", "group")


def token_shares(atlas: str | Path, patch_size: int, image_size: Sequence[int]) -> Tensor:
    """Share of each label's volume that lies in each token.

    Args:
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        patch_size: edge of a token in voxels; each merging of patches doubles it.
        image_size: voxels along x, y and z; those of the fixed grid, on which the labels lie.

    Returns:
        float32 (L, tokens), tokens in raster order, z fastest; each row sums to 1. Labels without a voxel of the grid
        are left out.

    Raises:
        InputError: the images are not on the grid, or tokens do not fill it.
    """
    if tuple(image_size) != grid.SHAPE or any(size % patch_size for size in image_size):
        raise InputError(
            f"labels are pooled over tokens that fill the grid of {grid.SHAPE} voxels, not {tuple(image_size)} voxels "
            f"in tokens of {patch_size}"
        )
    counts = [size // patch_size for size in image_size]
    tokens = int(np.prod(counts))
    x, y, z = np.indices(grid.SHAPE) // patch_size
    token = (x * counts[1] + y) * counts[2] + z
    labels = labels_on(load_atlas(atlas), grid.AFFINE, grid.SHAPE)
    numbers, row = np.unique(labels, return_inverse=True)
    volumes = np.bincount(row.ravel() * tokens + token.ravel(), minlength=len(numbers) * tokens).astype(float)
    volumes = volumes.reshape(-1, tokens)[numbers > 0]
    return torch.from_numpy(volumes / volumes.sum(axis=1, keepdims=True)).float()


def label_members(atlas: str | Path, level: str) -> list[list[int]]:
    """Rows of `token_shares` that make up each parcel of a level, see `parcels_of`; empty parcels are left out.

    Raises:
        InputError: there is no such level.
    """
    if level not in LEVELS:
        raise InputError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    loaded = load_atlas(atlas)
    found = np.unique(labels_on(loaded, grid.AFFINE, grid.SHAPE))
    row = {int(number): position for position, number in enumerate(found[found > 0])}
    members = [[row[number] for number in numbers if number in row] for numbers in parcels_of(loaded, level).values()]
    return [rows for rows in members if rows]


def mean_features(features: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean of clips' features (C, ..., c) over the clips of each run, so many, and all but channels: (n, c) float32."""
    return torch.stack([run.float().flatten(0, -2).mean(0) for run in features.split(list(counts))])


def pool(tokens: Tensor, shares: Tensor) -> Tensor:
    """Average tokens (b, x, y, z, t, c) over labels, in float32, by shares (L, x * y * z): (b, t, L, c)."""
    with torch.autocast(tokens.device.type, enabled=False):
        return torch.einsum("pn,bntc->btpc", shares, tokens.float().flatten(1, 3))
