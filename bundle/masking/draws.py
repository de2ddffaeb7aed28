"""Which voxels are hidden: pure functions, true = hidden. Every draw comes from the generator passed in.

Region masks are tubes: one mask `(X, Y, Z)` for all frames, or for those that `some_frames` draws. A token is a
patch of 6 x 6 x 6 voxels of one frame; random and window masks are drawn on the grid of tokens `(x, y, z, t)` and then
spread to voxels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bundle.errors import InputError

PATCH = 6
"""Voxels along each side of a token."""

WINDOW = (4, 4, 4, 4)
"""Tokens along x, y, z and t of a window of the network."""


def region_mask(labels: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """Voxels of `labels` `(X, Y, Z)` whose label number is among `wanted`: bool, the same shape."""
    return np.isin(labels, wanted)


def part_of_labels(
    labels: np.ndarray, wanted: Sequence[int], fraction: float, rng: np.random.RandomState
) -> tuple[int, ...]:
    """Choose whole labels of a region at random, for a volume as near to `fraction` of it as they allow.

    The labels are put in random order and the first few kept, at least one: as many as bring the volume
    nearest to the wanted one.

    Args:
        labels: label numbers `(X, Y, Z)` of an image.
        wanted: label numbers of the region; those without a voxel in the image are left out.
        fraction: above 0, at most 1.
        rng: generator of the order.

    Returns:
        The chosen label numbers; none if the image holds no voxel of the region.
    """
    numbers, voxels = np.unique(labels[region_mask(labels, wanted)], return_counts=True)
    if len(numbers) == 0:
        return ()
    order = rng.permutation(len(numbers))
    volume = np.cumsum(voxels[order])  # of the first 1, 2, ... labels
    kept = int(np.argmin(np.abs(volume - fraction * volume[-1]))) + 1
    return tuple(sorted(numbers[order[:kept]].tolist()))


def blob(candidates: Tensor, voxels: int, affine: np.ndarray, rng: np.random.RandomState) -> Tensor:
    """Exactly `voxels` candidates: those nearest, in mm, to one of them that is drawn at random.

    Args:
        candidates: bool `(X, Y, Z)`, such as a brain or a region.
        voxels: how many to choose; of equally distant ones, the first in C order.
        affine: `(4, 4)`, voxel index to mm.
        rng: generator of the centre.

    Returns:
        Bool `(X, Y, Z)`, on the device of `candidates`.

    Raises:
        InputError: there are fewer candidates than `voxels`.
    """
    index = candidates.nonzero()  # (N, 3)
    if voxels > len(index):
        raise InputError(f"a mask of {voxels} voxels does not fit in {len(index)} voxels; mask less")
    chosen = torch.zeros_like(candidates)
    if voxels == 0:
        return chosen
    scale = torch.as_tensor(np.asarray(affine)[:3, :3], dtype=torch.float64).to(index.device)
    offset = (index - index[rng.randint(len(index))]).double() @ scale.T  # (N, 3) mm
    # Rounded to 1e-6 mm^2, so that rounding errors of an oblique affine do not decide between equals.
    distance = offset.square().sum(1).mul(1e6).round()
    nearest = index[torch.sort(distance, stable=True).indices[:voxels]]
    chosen[tuple(nearest.T)] = True
    return chosen


def random_blocks(
    tokens: tuple[int, int, int, int],
    block: tuple[int, int, int, int],
    ratio: float,
    rng: np.random.RandomState,
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Hide blocks of tokens at random, a given share of them.

    A block of (1, 1, 1, 1) is a token, (1, 1, 1, t) a tube through all t frames, (4, 4, 4, 4) a window.

    Args:
        tokens: size of the token grid (x, y, z, t).
        block: tokens of a block along each axis; must divide the grid.
        ratio: share of the blocks, above 0 and at most 1; the number of hidden blocks is rounded.
        rng: generator of the draw.
        within: bool `(x, y, z)` tokens; only blocks with one of these are drawn, and counted. None: all.

    Returns:
        Bool `(x, y, z, t)`, true = hidden.

    Raises:
        InputError: the blocks do not divide the grid, or the ratio of them is less than half a block.
    """
    if any(size % side for size, side in zip(tokens, block, strict=True)):
        raise InputError(f"blocks of {block} tokens (x, y, z, t) do not divide a grid of {tokens} tokens")
    x, y, z, t = (size // side for size, side in zip(tokens, block, strict=True))
    places = np.arange(x * y * z * t)
    if within is not None:
        bx, by, bz, _ = block
        eligible = np.any(within.reshape(x, bx, y, by, z, bz), axis=(1, 3, 5))
        places = np.flatnonzero(eligible.repeat(t))  # (x, y, z) -> flat (x, y, z, t)
    count = round(ratio * len(places))
    if count == 0:
        raise InputError(f"ratio {ratio} of {len(places)} blocks of {block} tokens hides none; raise it")
    hidden = np.zeros((x, y, z, t), bool)
    hidden.flat[rng.choice(places, count, replace=False)] = True
    for axis, side in enumerate(block):
        hidden = hidden.repeat(side, axis)  # blocks -> tokens
    return hidden


def some_frames(frames: int, share: float, block: int, rng: np.random.RandomState) -> np.ndarray:
    """Choose frames of a clip at random, in blocks of consecutive ones.

    Every way to place the blocks without overlap is as likely as the others; two of them may touch.

    Args:
        frames: of the clip.
        share: of the frames, above 0 and at most 1; the number of blocks is rounded.
        block: frames chosen together; 1 chooses them one by one.
        rng: generator of the draw.

    Returns:
        Bool `(frames,)`, true = chosen.

    Raises:
        InputError: the share is less than half a block, or a block does not fit in the clip.
    """
    count = min(round(share * frames / block), frames // block)
    if count == 0:
        raise InputError(
            f"a share of {share} of {frames} frames holds no block of {block} frames; take shorter blocks, or more of "
            "the frames"
        )
    # A block counts as one place and its further frames are added afterwards, so that no two overlap.
    places = np.sort(rng.choice(frames - count * (block - 1), count, replace=False))
    starts = places + np.arange(count) * (block - 1)
    chosen = np.zeros(frames, bool)
    chosen[starts[:, None] + np.arange(block)] = True
    return chosen


def tokens_with(voxels: Tensor, patch: int = PATCH) -> Tensor:
    """Tokens `(X/p, Y/p, Z/p)` that contain a true voxel of a bool image `(X, Y, Z)`."""
    x, y, z = token_grid(tuple(voxels.shape), patch)
    return voxels.reshape(x, patch, y, patch, z, patch).any(5).any(3).any(1)


def to_voxels(tokens: Tensor, patch: int = PATCH) -> Tensor:
    """Spread tokens `(x, y, z, ...)` to voxels `(x*p, y*p, z*p, ...)`."""
    for axis in range(3):
        tokens = tokens.repeat_interleave(patch, axis)
    return tokens


def token_grid(shape: tuple[int, ...], patch: int = PATCH) -> tuple[int, int, int]:
    """Size of the token grid of a spatial shape (3 numbers), which the patch must divide."""
    if any(size % patch for size in shape):
        raise InputError(f"an image of {tuple(shape)} voxels cannot be cut into tokens of {patch}^3 voxels")
    x, y, z = (size // patch for size in shape)
    return x, y, z
