"""Open one 4D BOLD file, refuse what cannot be used, and bring its frames onto the grid, to the TR, to z.

Frames are read in order, one at a time, as the file holds them.
"""

import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.errors import InputError

logger = logging.getLogger(__name__)

TR_RANGE = (0.1, 20.0)  # seconds
SECONDS_PER_UNIT = {8: 1.0, 16: 1e-3, 24: 1e-6}  # by NIfTI's code: s, ms, us
MNI_CODE = 4  # the NIfTI xform code for MNI152
KEPT_BYTES = 3 * 2**28  # 768 MiB: 400 frames of int16 over the MNI152 2 mm box
_READ_ERRORS = (
    OSError, EOFError, ValueError, OverflowError, zlib.error, nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)  # fmt: skip


@dataclass(frozen=True)
class Bold:
    """One 4D run whose header has passed every check; its data stay on disk.

    Attributes:
        path: the file.
        image: the nibabel image, not loaded.
        affine: (4, 4) float64, stored voxel to MNI world, mm.
        axcodes: the stored orientation, for example ("L", "A", "S").
        tr: repetition time, seconds.
        tr_source: where the TR came from ("given", the sidecar's name, or "header").
        space: the space's name, always beginning with "MNI".
    """

    path: Path
    image: Any
    affine: NDArray[np.float64]
    axcodes: tuple[str, ...]
    tr: float
    tr_source: str
    space: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """The three spatial sizes as stored."""
        return self.image.shape[:3]

    @property
    def frames(self) -> int:
        """The number of time points."""
        return self.image.shape[3]


def stem(path: Path) -> str:
    """A file's name without .nii.gz, .nii, .hdr or .img."""
    return re.sub(r"\.(nii(\.gz)?|hdr|img)$", "", path.name)


def entities(path: Path) -> dict[str, str]:
    """The BIDS entities in a file's name, by key: `sub-01_task-rest_bold.nii` gives sub and task."""
    return dict(re.findall(r"(?:^|_)([A-Za-z]+)-([A-Za-z0-9+]+)(?=_|$)", stem(path)))


def open_bold(path: str | Path, tr: float | None = None, space: str | None = None) -> Bold:
    """Open a BOLD run without reading its data.

    Args:
        path: a 4D NIfTI file (.nii, .nii.gz or a .hdr/.img pair).
        tr: repetition time in seconds, used instead of the sidecar's and the header's.
        space: the user's word that the file is in this space; must begin with "MNI".

    Returns:
        The run, with TR, affine and space decided.

    Raises:
        InputError: the file is missing, unreadable, not NIfTI, not 4D, not real-valued, has no usable TR or
            affine, or is not known to be in MNI space.
    """
    path = Path(path)
    image = _load_nifti(path)
    if len(image.shape) != 4 or min(image.shape) < 1:
        raise InputError(f"{path} has shape {image.shape}, but BOLD must be 4D (x, y, z, time); give the 4D run")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path} holds {image.get_data_dtype()} values, but BOLD must be real numbers; convert it first"
        )
    affine = _affine_of(image, path, assume=space is not None)
    seconds, tr_source = _tr_of(image, path, tr)
    return Bold(path, image, affine, nib.aff2axcodes(affine), seconds, tr_source, space=_space_of(image, path, space))


def _load_nifti(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        image: Any = nib.load(path)
    except _READ_ERRORS as error:
        raise InputError(f"{path} cannot be read as NIfTI ({_one_line(error)}); copy or convert it again") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"{path} is {type(image).__name__}, not NIfTI; convert it to .nii.gz first")
    return image


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _affine_of(image: Any, path: Path, assume: bool) -> NDArray[np.float64]:
    """The sform when set, else the qform; with neither, nibabel's centred default if the space is assumed."""
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        if not assume:
            raise InputError(
                f"{path} has neither an sform nor a qform, so its place in space is unknown; "
                "if it is in MNI space with its centre at the origin, say so with --space MNI"
            )
        logger.warning("%s has neither an sform nor a qform; its centre is taken as the world origin", path)
    affine = np.asarray(image.affine, np.float64)
    finite = np.isfinite(affine).all()
    if not finite or abs(np.linalg.det(affine[:3, :3])) < 1e-6 or None in nib.aff2axcodes(affine):
        raise InputError(f"{path} has an affine that cannot be inverted ({affine[:3].tolist()}); repair its header")
    return affine


def _space_of(image: Any, path: Path, given: str | None) -> str:
    """The MNI space's name, from the user, else the BIDS name, else the affine's code."""
    if given is not None:
        if not given.startswith("MNI"):
            raise InputError(f"--space must begin with MNI, not {given!r}; bring {path} into MNI space first")
        return given
    named = entities(path).get("space")
    if named is not None and named.startswith("MNI"):
        return named
    header = image.header
    code = int(header["sform_code"] or header["qform_code"])
    if named is None and code == MNI_CODE:
        return "MNI152"
    found = f"its name says space-{named}" if named else f"no space-MNI in its name, affine code {code}"
    raise InputError(
        f"{path} is not known to be in MNI space ({found}); give the MNI-space file, or --space MNI if it is one"
    )


def _tr_of(image: Any, path: Path, given: float | None) -> tuple[float, str]:
    """The TR in seconds and its source: the user, else the BIDS sidecar, else the header with its unit."""
    sidecar = path.with_name(stem(path) + ".json")
    header_tr = _header_tr(image)
    tr: Any
    if given is not None:
        tr, source = given, "given"
    elif (sidecar_tr := _sidecar_tr(sidecar)) is not None:
        tr, source = sidecar_tr, sidecar.name
    else:
        tr, source = header_tr, "header"
        if tr is None:
            unit = nib.nifti1.unit_codes.label.get(_time_unit(image), "unknown")
            size = float(image.header["pixdim"][4])
            raise InputError(f"{path} gives its TR as {size:g} in the unit {unit!r}; give --tr in seconds")
    if isinstance(tr, bool) or not isinstance(tr, int | float) or not TR_RANGE[0] <= tr <= TR_RANGE[1]:
        raise InputError(
            f"TR must be between {TR_RANGE[0]} and {TR_RANGE[1]} seconds, not {tr!r} ({path}, {source}); "
            "give --tr in seconds"
        )
    if source != "header" and header_tr is not None and abs(header_tr - tr) > 1e-3:
        logger.warning("%s: TR %g s (%s) is used; the header says %g s", path, tr, source, header_tr)
    return float(tr), source


def _header_tr(image: Any) -> float | None:
    """The header's TR in seconds, to the microsecond (it is stored as float32); None if it has no unit."""
    factor = SECONDS_PER_UNIT.get(_time_unit(image))
    return None if factor is None else round(float(image.header["pixdim"][4]) * factor, 6)


def _time_unit(image: Any) -> int:
    """NIfTI's code of the unit of time, which need not be one that NIfTI defines."""
    return int(image.header["xyzt_units"]) & ~7


def _sidecar_tr(sidecar: Path) -> Any:
    if not sidecar.is_file():
        return None
    try:
        return json.loads(sidecar.read_text(encoding="utf-8")).get("RepetitionTime")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{sidecar} is not a JSON object ({_one_line(error)}); repair or remove it") from error


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
        except _READ_ERRORS as error:
            raise InputError(f"{bold.path} is truncated or damaged ({_one_line(error)}); copy it again") from error


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
    image = _load_nifti(path)
    affine = _affine_of(image, path, assume=False)
    try:
        values = np.asarray(image.dataobj)
    except _READ_ERRORS as error:
        raise InputError(f"{path} is truncated or damaged ({_one_line(error)}); copy it again") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise InputError(f"{path} has shape {values.shape}, but a brain mask must be 3D; give a 3D mask")
    if not (values > 0.5).any():
        raise InputError(f"the brain mask {path} is empty (no value above 0.5); give a mask that holds the brain")
    return values > 0.5, affine


def sample(
    bold: Bold, brain: NDArray[np.bool_], read: Callable[[], Iterator[NDArray]] | None = None
) -> NDArray[np.float32]:
    """Interpolate every frame at the brain's grid voxels: one trilinear step in world space, streamed.

    Args:
        bold: the run.
        brain: bool, `grid.SHAPE`, inside the run's field of view.
        read: the run's `frame_reader`, where it was used before; None makes one.

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
            operator = _operator(bold, brain, background)
            has_background = background.any()
        if has_background or not finite.all():
            wrong |= (finite == background) | np.isinf(frame)
            frame = np.where(finite, frame, 0)
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


def _operator(bold: Bold, brain: NDArray[np.bool_], background: NDArray[np.bool_]) -> Any:
    """Trilinear weights whose columns run in the file's order, with none for NaN background (XYZ,)."""
    if background.any():
        lost = grid.nearest(background.reshape(bold.shape, order="F"), bold.affine) & brain
        if lost.any():
            raise InputError(f"{bold.path} is NaN in {lost.sum()} grid voxels of its brain mask; give a tighter mask")
    # an array (X, Y, Z) in the file's order is an array (Z, Y, X) in C order
    affine, shape = bold.affine[:, [2, 1, 0, 3]], bold.shape[::-1]
    return grid.linear_operator(affine, shape, np.flatnonzero(brain), ~background)


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
