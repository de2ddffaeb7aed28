"""Frames in the brain, (T, V): to another TR, and to z."""

import math

import numpy as np
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.errors import InputError


def frames_after(frames: int, tr: float, new_tr: float) -> int:
    """How many frames at 0, new_tr, 2 new_tr ... seconds lie no later than the last of `frames` at `tr`."""
    return math.floor((frames - 1) * tr / new_tr + grid.SNAP) + 1


def resample_tr(frames: NDArray[np.float32], tr: float, new_tr: float) -> NDArray[np.float32]:
    """Interpolate linearly in time, between the two neighbouring frames.

    Args:
        frames: (T, V) at 0, tr, 2 tr ... seconds.
        tr: their spacing, seconds.
        new_tr: the wanted spacing, seconds.

    Returns:
        (T', V) float32 at 0, new_tr, 2 new_tr ... seconds, none after the last input frame; frames that fall on an
        input frame are copies. The input itself where the spacing is the same.
    """
    if tr == new_tr:
        return frames
    out = np.empty((frames_after(len(frames), tr, new_tr), frames.shape[1]), np.float32)
    for index, row in enumerate(out):
        position = min(index * new_tr / tr, len(frames) - 1)  # rounding may put the last one behind it
        if abs(position - round(position)) < grid.SNAP:
            row[:] = frames[round(position)]
        else:
            before = math.floor(position)
            share = np.float32(position - before)
            np.multiply(frames[before], 1 - share, out=row)
            row += share * frames[before + 1]
    return out


def zscore(frames: NDArray[np.float32]) -> tuple[NDArray[np.float16], float, float]:
    """Scale a run by the mean and population SD over all its voxels and frames: z = (x - mean) / SD.

    Args:
        frames: (T, V) in any unit; negative values are as good as others.

    Returns:
        z (T, V) as float16 (a step of at most 0.001 for |z| < 2), the mean and the SD in the frames' unit,
        both accumulated in float64.

    Raises:
        InputError: the values are all the same.
    """
    mean = float(frames.mean(dtype=np.float64))
    squares = sum(float(np.square(frame.astype(np.float64) - mean).sum()) for frame in frames)
    sd = math.sqrt(squares / frames.size)
    if sd <= 1e-6 * abs(mean):  # beyond float32: what varies is rounding
        raise InputError(f"every value in the brain is {mean:g} (SD {sd:g}); the run holds no signal")
    z = np.empty(frames.shape, np.float16)
    for out, frame in zip(z, frames, strict=True):
        out[:] = (frame.astype(np.float64) - mean) / sd
    return z, mean, sd
