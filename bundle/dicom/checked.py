"""Have dcm2niix convert one series, and compare what it wrote with the headers: its exit status cannot be trusted."""

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bundle.dicom.brain import LEAST_DETAIL, detail
from bundle.dicom.series import EVEN, IncompleteError, Layout, Series
from bundle.preparation.bold import READ_ERRORS
from bundle.preparation.chain import load_preparation
from bundle.preparation.scaling import frames_after
from bundle.preparation.transforms import ResampleTRd

TR_TOLERANCE = 0.01  # share by which dcm2niix's TR may differ from RepetitionTime (0018,0080)
SAME_VOXEL = 0.1  # share of a voxel by which places may differ
LPS = np.array([-1.0, -1.0, 1.0])  # from DICOM's world to NIfTI's RAS and back
TIME_LIMIT = 600  # seconds for one series
OPTIONS = ("-b", "y", "-ba", "y", "-z", "n", "-f", "run", "-i", "n", "-x", "n", "-l", "o", "-p", "y", "-d", "0")
"""A sidecar, no compression, all images as they are, in the stored type, Philips values in their absolute scale."""


def converted(series: Series, layout: Layout, work: Path, stopped: bool) -> tuple[Any, dict[str, Any]]:
    """Convert one series in a folder of its own.

    Args:
        series: of kind "BOLD".
        layout: what its headers say.
        work: folder to be made; what is given back reads from it.
        stopped: the user's word that scans may have been stopped before all planned volumes were taken.

    Returns:
        The nibabel image (X, Y, Z, T), not loaded, and the sidecar as dcm2niix wrote it.

    Raises:
        IncompleteError: dcm2niix fails or disagrees with the headers, or it is no head, or too short.
    """
    image, sidecar = _run(series, layout, work)
    _compare_tr(layout, image, sidecar)
    _compare_place(layout, image)
    _compare_pixels(series, layout, image)
    _look(layout, image)
    _refuse_short(layout, stopped)
    return image, sidecar


def _run(series: Series, layout: Layout, work: Path) -> tuple[Any, dict[str, Any]]:
    """Have dcm2niix convert one series; its image, not loaded, and its sidecar."""
    import dcm2niix

    inputs, outputs = work / "in", work / "out"
    inputs.mkdir(parents=True)
    outputs.mkdir()
    for number, file in enumerate(series.images, start=1):
        (inputs / f"{number:06d}.dcm").symlink_to(file.path.absolute())
    command = [dcm2niix.bin, *OPTIONS, "-o", outputs, inputs]
    home = os.environ | {"HOME": str(work)}  # its options in the user's home do not count
    try:
        done = subprocess.run(command, env=home, capture_output=True, timeout=TIME_LIMIT, stdin=subprocess.DEVNULL)
        status = done.returncode
    except subprocess.TimeoutExpired:
        status = -1
    written = sorted(outputs.iterdir())
    if status or [path.suffix for path in written] != [".json", ".nii"]:
        raise IncompleteError(f"is not converted by dcm2niix (status {status}, {len(written)} files)")
    try:
        image: Any = nib.Nifti1Image.from_filename(written[1])
        sidecar = json.loads(written[0].read_text(encoding="utf-8", errors="replace"), strict=False)  # free text
        whole = written[1].stat().st_size >= image.dataobj.offset + image.header["bitpix"] // 8 * np.prod(image.shape)
    except READ_ERRORS:
        whole = False
    if not whole or not isinstance(sidecar, dict):
        raise IncompleteError("is converted by dcm2niix to a broken file")
    if image.shape != layout.shape:
        raise IncompleteError(
            f"has {_times(layout.shape)} voxels and volumes by its headers, and {_times(image.shape)} by dcm2niix"
        )
    return image, sidecar


def _times(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def is_number(value: Any) -> bool:
    """Whether a value of a sidecar is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _compare_tr(layout: Layout, image: Any, sidecar: dict[str, Any]) -> None:
    """RepetitionTime is what counts: dcm2niix may take the TR from clocks."""
    times: dict[str, Any] = {"header": float(image.header.get_zooms()[3]), "sidecar": sidecar.get("RepetitionTime")}
    for place, tr in times.items():
        if not is_number(tr):
            raise IncompleteError(f"has no TR in dcm2niix's {place}")
        if abs(tr - layout.tr) > TR_TOLERANCE * layout.tr:
            raise IncompleteError(
                f"has a RepetitionTime (0018,0080) of {layout.tr:g} s, but {tr:g} s by dcm2niix's {place}, as "
                "where the clock jumps; its TR is not certain"
            )


def _compare_place(layout: Layout, image: Any) -> None:
    """The corners of the first slice must be corners of the NIfTI, and its rows and columns the axes X and Y."""
    voxels = nib.affines.apply_affine(np.linalg.inv(image.affine), layout.corners * LPS)  # (3, 3)
    columns, rows, slices, _ = layout.shape
    far = np.abs(voxels[0] - np.array([columns - 1, rows - 1, slices - 1]))
    sides = np.abs(voxels[1:] - voxels[0]) - [[columns - 1, 0, 0], [0, rows - 1, 0]]
    if max(np.minimum(np.abs(voxels[0]), far).max(), np.abs(sides).max()) > SAME_VOXEL:
        raise IncompleteError("lies elsewhere by its headers than by dcm2niix")


def _compare_pixels(series: Series, layout: Layout, image: Any) -> None:
    """Compare the sum of a slice of each volume (of a mosaic, of all slices) with that of the file it came from.

    Compressed pixels are not compared.
    """
    raw = np.asanyarray(image.dataobj.get_unscaled())  # (X, Y, Z, T)
    if raw.dtype.kind not in "iu":
        raise IncompleteError("is scaled by dcm2niix as its headers do not say")
    if not all(each.pixels for each in series.images):
        return
    order = _slice_order(layout, image) if len(layout.places) else np.arange(1)
    columns, rows = layout.shape[:2]
    for volume, frames in enumerate(layout.frames):
        slot = volume % len(frames)
        file, frame = frames[slot]
        source = series.images[file]
        across = int(np.ceil(np.sqrt(source.mosaic))) or 1
        count = rows * columns * across**2
        try:
            pixels = np.fromfile(source.path, source.dtype, count, offset=source.pixels + 2 * int(frame) * count)
        except OSError:
            raise IncompleteError("has a file that cannot be read again") from None
        tiles = pixels.reshape(across, rows, across, columns).swapaxes(1, 2).reshape(-1, rows, columns)
        expected = tiles[: source.mosaic or 1].sum(dtype=np.int64)
        written = raw[..., volume] if source.mosaic else raw[:, :, order[slot], volume]
        if written.sum(dtype=np.int64) != expected:
            raise IncompleteError(f"has other pixels in volume {volume + 1} than dcm2niix has written")


def _slice_order(layout: Layout, image: Any) -> NDArray[np.intp]:
    """Which slice of the NIfTI lies at each place of the layout; (slices,)."""
    affine = image.affine
    centres = affine[:3, 3] + np.arange(layout.shape[2])[:, None] * affine[:3, 2]  # (slices, 3), RAS
    along = (centres * LPS) @ layout.normal
    order = np.argsort(along)
    if np.abs(along[order] - layout.places).max() > EVEN * np.diff(layout.places).mean():
        raise IncompleteError("has slices elsewhere by its headers than by dcm2niix")
    return order


def _look(layout: Layout, image: Any) -> None:
    """Refuse what is no head."""
    mean = np.zeros(layout.shape[:3])
    for t in range(layout.shape[3]):
        mean += np.asarray(image.dataobj[..., t]) / layout.shape[3]
    if not np.isfinite(mean).all():
        raise IncompleteError("has values that are not finite")
    found = detail(mean, layout.pixel_mm)
    if found < LEAST_DETAIL:
        raise IncompleteError(f"shows no brain, but something smooth such as a phantom (detail {found:.3f})")


def _refuse_short(layout: Layout, stopped: bool) -> None:
    (resampling,) = (step for step in load_preparation().steps if isinstance(step, ResampleTRd))
    frames, volumes = frames_after(layout.shape[3], layout.tr, resampling.tr), layout.shape[3]
    if frames < resampling.min_frames:
        raise IncompleteError(
            f"is too short: {volumes} volumes at {layout.tr:g} s are {frames} frames at {resampling.tr:g} s, "
            f"and {resampling.min_frames} are needed"
        )
    if volumes < layout.planned and not stopped:
        raise IncompleteError(
            f"holds {volumes} of the {layout.planned} volumes that the scanner was to take; send it whole, or give "
            "--stopped if the scan was stopped early"
        )
