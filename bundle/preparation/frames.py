"""The frames of a BOLD run, read in order, one at a time, as the file holds them, and brought onto the grid."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.preparation.bold import READ_ERRORS, Bold, affine_of, load_nifti, one_line

KEPT_BYTES = 3 * 2**28  # 768 MiB: 400 frames of int16 over the MNI152 2 mm box


def frame_reader(bold: Bold, keep_up_to: int = KEPT_BYTES) -> Callable[[], Iterator[NDArray]]:
    """A function that reads a run's frames in order, once per call.

    A run of up to `keep_up_to` bytes is decompressed once and kept, since reading is what takes longest.

    Args:
        bold: the run.
        keep_up_to: bytes; 0 reads the file again at every call.

    Returns:
        A function whose iterator yields frames (XYZ,), unscaled, in the file's order: x changes fastest.

    Raises:
        InputError: (by the function, or here where the run is kept) the file ends early or is damaged.
    """
    if math.prod(bold.image.shape) * bold.image.dataobj.dtype.itemsize > keep_up_to:
        return partial(_read_frames, bold)
    # one block of memory, which goes back to the system as a whole, unlike a list of frames
    kept = np.empty((bold.frames, math.prod(bold.shape)), bold.image.dataobj.dtype)
    for number, frame in enumerate(_read_frames(bold)):
        kept[number] = frame
    return lambda: iter(kept)


def _read_frames(bold: Bold) -> Iterator[NDArray]:
    data = bold.image.dataobj
    size = math.prod(bold.shape) * data.dtype.itemsize
    path = bold.image.file_map["image"].filename or bold.image.file_map["header"].filename
    # one frame is decompressed by a thread of its own while the caller works on the one before
    with ImageOpener(path) as file, ThreadPoolExecutor(1) as ahead:
        try:
            file.seek(data.offset)
            reading = ahead.submit(file.read, size)
            for number in range(bold.frames):
                values = reading.result()
                if len(values) < size:
                    raise EOFError("the file ends early")
                reading = ahead.submit(file.read, size if number + 1 < bold.frames else 1)
                yield np.frombuffer(values, data.dtype)
            reading.result()  # the end of a gzip file holds its checksum
        except READ_ERRORS as error:
            raise InputError(f"{bold.path} is truncated or damaged ({one_line(error)}); copy it again") from error


def varying(bold: Bold, read: Callable[[], Iterator[NDArray]] | None = None) -> NDArray[np.bool_]:
    """The voxels, as stored, whose value is not the same at every frame (NaN throughout is the same)."""
    frames = (read or frame_reader(bold, 0))()
    first = next(frames)
    changes = np.zeros(first.shape, bool)
    for frame in frames:
        differs = frame != first
        if frame.dtype.kind == "f":
            differs &= ~(np.isnan(first) & np.isnan(frame))
        changes |= differs
    return changes.reshape(bold.shape, order="F")


def brain_on_grid(
    bold: Bold, mask: str | Path | None, read: Callable[[], Iterator[NDArray]] | None = None
) -> NDArray[np.bool_]:
    """A run's non-background voxels on the grid, by nearest neighbour, inside the run's field of view.

    Args:
        bold: the run.
        mask: a 3D brain mask (above 0.5 is brain) in any space that its own affine maps to the same world;
            None takes the voxels that are not constant over time, decided on the run's own voxels.
        read: the run's `frame_reader`, where it is used again; None makes one.

    Returns:
        A bool array of `grid.SHAPE`.

    Raises:
        InputError: the mask cannot be read, is not 3D, is empty or lies elsewhere; every voxel is constant.
    """
    if mask is None:
        native = varying(bold, read)
        if not native.any():
            raise InputError(f"{bold.path} is constant over time in every voxel; it holds no signal")
        affine = bold.affine
    else:
        native, affine = _load_mask(Path(mask))
    brain = grid.nearest(native, affine) & grid.covered(bold.affine, bold.shape)
    if not brain.any():
        what = f"the brain mask {mask}" if mask is not None else "the part of the run that varies over time"
        raise InputError(f"{bold.path} and {what} do not overlap on the MNI grid; check that both are in MNI space")
    return brain


def _load_mask(path: Path) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    image = load_nifti(path)
    affine = affine_of(image, path, assume=False)
    try:
        values = np.asarray(image.dataobj)
    except READ_ERRORS as error:
        raise InputError(f"{path} is truncated or damaged ({one_line(error)}); copy it again") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise InputError(f"{path} has shape {values.shape}, but a brain mask must be 3D; give a 3D mask")
    if not (values > 0.5).any():
        raise InputError(f"the brain mask {path} is empty (no value above 0.5); give a mask that holds the brain")
    return values > 0.5, affine


def sample(
    bold: Bold,
    brain: NDArray[np.bool_],
    read: Callable[[], Iterator[NDArray]] | None = None,
    affines: NDArray[np.float64] | None = None,
) -> NDArray[np.float32]:
    """Interpolate every frame at the brain's grid voxels: one trilinear step in world space, streamed.

    Args:
        bold: the run.
        brain: bool, `grid.SHAPE`, inside the run's field of view.
        read: the run's `frame_reader`, where it was used before; None makes one.
        affines: (T, 4, 4), of each frame, its voxels to MNI world, where the head moved; None: the run's, of all.

    Returns:
        (T, V) float32 in the file's own units; V runs over `np.flatnonzero(brain)`.

    Raises:
        InputError: NaN or Inf in the brain, or elsewhere other than as NaN throughout (SPM's background).
    """
    frames = np.empty((bold.frames, int(brain.sum())), np.float32)
    slope, inter = float(bold.image.dataobj.slope), float(bold.image.dataobj.inter)
    wrong = np.zeros(math.prod(bold.shape), bool)  # voxels that are not finite and not plain background
    for number, frame in enumerate((read or frame_reader(bold, 0))()):
        finite = np.isfinite(frame) if frame.dtype.kind == "f" else np.True_
        if number == 0:
            background = np.isnan(frame) if frame.dtype.kind == "f" else np.zeros(frame.shape, bool)
            has_background = background.any()
        if has_background or not finite.all():
            wrong |= (finite == background) | np.isinf(frame)
            frame = np.where(finite, frame, 0)
        if number == 0 or affines is not None:
            operator = _operator(bold.affine if affines is None else affines[number], bold, brain, background)
        sampled = operator @ frame.astype(np.float32)  # (XYZ,) -> (V,)
        if (slope, inter) != (1, 0):
            # after interpolating, which is the same as each row's weights sum to 1, and touches fewer numbers
            sampled = sampled.astype(np.float64) * slope + inter
        frames[number] = sampled
    if wrong.any():
        raise InputError(
            f"{bold.path} holds NaN or Inf in {int(wrong.sum())} voxels that are not plain background; "
            "repair the file or exclude the run"
        )
    return frames


def _operator(affine: NDArray[np.float64], bold: Bold, brain: NDArray[np.bool_], background: NDArray[np.bool_]) -> Any:
    """Trilinear weights whose columns run in the file's order, with none for NaN background (XYZ,)."""
    if background.any():
        lost = grid.nearest(background.reshape(bold.shape, order="F"), affine) & brain
        if lost.any():
            raise InputError(f"{bold.path} is NaN in {lost.sum()} grid voxels of its brain mask; give a tighter mask")
    # an array (X, Y, Z) in the file's order is an array (Z, Y, X) in C order
    return grid.linear_operator(affine[:, [2, 1, 0, 3]], bold.shape[::-1], np.flatnonzero(brain), ~background)
