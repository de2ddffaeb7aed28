"""Open one 4D BOLD file, refuse what cannot be used, and bring its frames onto the grid, to the TR, to z.

Frames are read in order, one at a time, as the file holds them.
"""

import json
import logging
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bundle.errors import InputError
from bundle.preparation.bids_names import entities, stem

logger = logging.getLogger(__name__)

TR_RANGE = (0.1, 20.0)  # seconds
SECONDS_PER_UNIT = {8: 1.0, 16: 1e-3, 24: 1e-6}  # by NIfTI's code: s, ms, us
MNI_CODE = 4  # the NIfTI xform code for MNI152
MOST_GZIP = 1100  # times: gzip makes nothing smaller than by a factor of 1032
NATIVE = "native, to MNI152 by one affine transform: no substitute for fMRIPrep"
"""What is said of the space of a run that was opened in its own; see `bundle.preparation.register`."""
READ_ERRORS = (
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
        space: the space's name, beginning with "MNI"; or `NATIVE`.
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


def open_bold(path: str | Path, tr: float | None = None, space: str | None = None, native: bool = False) -> Bold:
    """Open a BOLD run without reading its data.

    Args:
        path: a 4D NIfTI file (.nii, .nii.gz or a .hdr/.img pair).
        tr: repetition time in seconds, used instead of the sidecar's and the header's.
        space: the user's word that the file is in this space; must begin with "MNI".
        native: take a run in its own space, as it is to be registered, and no other.

    Returns:
        The run, with TR, affine and space decided.

    Raises:
        InputError: the file is missing, unreadable, not NIfTI, not 4D, not real-valued, has no usable TR or
            affine, or is not known to be in MNI space (`native`: is in MNI space, or has two affines that
            contradict each other).
    """
    path = Path(path)
    image = load_nifti(path)
    if len(image.shape) != 4 or min(image.shape) < 1:
        raise InputError(f"{path} has shape {image.shape}, but BOLD must be 4D (x, y, z, time); give the 4D run")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(
            f"{path} holds {image.get_data_dtype()} values, but BOLD must be real numbers; convert it first"
        )
    if native:
        _refuse_mni(image, path, space)
    affine = affine_of(image, path, assume=space is not None)
    seconds, tr_source = _tr_of(image, path, tr)
    space = NATIVE if native else _space_of(image, path, space)
    return Bold(path, image, affine, nib.aff2axcodes(affine), seconds, tr_source, space)


def load_nifti(path: Path) -> Any:
    """Open a NIfTI file without reading its data; raises `InputError` where it is missing or cannot be read."""
    if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises where a name is too long)
        raise InputError(f"{path} does not exist; check the path")
    try:
        image: Any = nib.load(path)
    except READ_ERRORS as error:
        raise InputError(f"{path} cannot be read as NIfTI ({one_line(error)}); copy or convert it again") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"{path} is {type(image).__name__}, not NIfTI; convert it to .nii.gz first")
    _refuse_impossible_size(image, path)
    return image


def _refuse_impossible_size(image: Any, path: Path) -> None:
    """Refuse a header that claims more than its file can hold, before memory is asked for."""
    file = Path(image.file_map["image"].filename or image.file_map["header"].filename)
    claimed = math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
    most = {".nii": 1, ".img": 1, ".gz": MOST_GZIP}.get(file.suffix, math.inf)
    if file.is_file() and claimed > most * file.stat().st_size:
        raise InputError(
            f"{path} claims {' x '.join(map(str, image.shape))} values, more than the file can hold; copy or "
            "convert it again"
        )


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def affine_of(image: Any, path: Path, assume: bool) -> NDArray[np.float64]:
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


def _refuse_mni(image: Any, path: Path, given: str | None) -> None:
    """Refuse what needs no registration, and what does not say where left is."""
    header = image.header
    codes = [int(header["sform_code"]), int(header["qform_code"])]
    if given is not None or entities(path).get("space", "").startswith("MNI") or (codes[0] or codes[1]) == MNI_CODE:
        raise InputError(f"{path} is in MNI space already, so --register would only blur it; prepare it without")
    if not any(codes):
        raise InputError(
            f"{path} has neither an sform nor a qform, so left and right are unknown; convert it from DICOM again"
        )
    if all(codes) and _axcodes(header.get_sform) != _axcodes(header.get_qform):
        raise InputError(
            f"{path} has an sform and a qform of different orientations, so left and right are unknown; repair its "
            "header"
        )


def _axcodes(affine: Callable[[], NDArray]) -> tuple[str, ...] | None:
    """Orientation of an affine of a header; None where it has none."""
    try:
        return nib.aff2axcodes(affine())
    except (ValueError, nib.spatialimages.HeaderDataError, np.linalg.LinAlgError):
        return None


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
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{sidecar} is not a JSON object ({one_line(error)}); repair or remove it") from error
