"""Frames in the brain, (T, V): to another TR, and to z."""

import math
from collections.abc import Mapping
from typing import Any

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


def zscore(frames: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.float64], float, float]:
    """Scale each voxel by its own mean and population SD over the run: z = (x - mean) / SD.

    Args:
        frames: (T, V) in any unit; negative values are as good as others.

    Returns:
        z (T, V) as float16 (a step of at most 0.1 % of the voxel's SD for |z| < 2), 0 where a voxel does not vary;
        moments (2, V), each voxel's mean and SD in the frames' unit, SD 0 where it does not vary; and the mean and
        the SD over all voxels and frames. All are accumulated in float64.

    Raises:
        InputError: the values are all the same.
    """
    mean = frames.mean(0, dtype=np.float64)  # (V,)
    squares = np.zeros_like(mean)
    for frame in frames:
        squares += np.square(frame - mean)
    sd = np.sqrt(squares / len(frames))
    sd[sd <= 1e-6 * np.abs(mean)] = 0  # beyond float32: what varies is rounding
    whole_mean = float(mean.mean())
    whole_sd = math.sqrt(float(np.mean(np.square(sd) + np.square(mean - whole_mean))))
    if whole_sd <= 1e-6 * abs(whole_mean):
        raise InputError(f"every value in the brain is {whole_mean:g} (SD {whole_sd:g}); the run holds no signal")
    step = np.divide(1, sd, out=np.zeros_like(sd), where=sd > 0)
    z = np.empty(frames.shape, np.float16)
    for out, frame in zip(z, frames, strict=True):
        out[:] = (frame - mean) * step
    return z, np.stack([mean, sd]), whole_mean, whole_sd


def run_moments(moments: NDArray[np.float64], record: Mapping[str, Any]) -> NDArray[np.float32]:
    """Each voxel's mean and SD (2, V) in units of the run's z: over all of its voxels and frames."""
    mean, sd = moments
    return np.stack([(mean - record["mean"]) / record["sd"], sd / record["sd"]]).astype(np.float32)
