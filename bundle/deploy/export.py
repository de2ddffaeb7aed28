"""Back to NIfTI: stored runs, reconstructions and attribution maps, in MNI space, in the original units."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.anatomy.parcels import dense
from bundle.data.normalisation import Normalisation
from bundle.errors import InputError
from bundle.files import written_whole
from bundle.preparation import store
from bundle.preparation.bold import MNI_CODE
from bundle.preparation.scaling import run_moments
from bundle.training.checkpoints import load_checkpoint, saved_facts

UNITS = ("original", "z")


def to_nifti(values: NDArray, voxels: NDArray | None = None, tr: float | None = None) -> nib.Nifti1Image:
    """Make an image on the fixed grid.

    Args:
        values: (V,) or (T, V) at `voxels`; without them (X, Y, Z) or (X, Y, Z, T), or a batch's item (1, X, Y, Z, T).
        voxels: (V,) flat C-order indices into `grid.SHAPE`; the image is 0 elsewhere.
        tr: seconds between frames, for a 4D image.

    Returns:
        A float32 image with the grid's affine as sform and qform, both of the code for MNI152, and sizes in mm and s.

    Raises:
        InputError: the values are not on the grid, or a 4D image has no TR.
    """
    values = np.asarray(values, np.float32)
    if voxels is not None:
        on_grid = dense(values, voxels)
        values = np.moveaxis(on_grid, 0, -1) if on_grid.ndim == 4 else on_grid  # (T, X, Y, Z) -> (X, Y, Z, T)
    elif values.ndim == 5 and values.shape[0] == 1:
        values = values[0]
    if values.ndim not in (3, 4) or values.shape[:3] != grid.SHAPE:
        raise InputError(
            f"an array of shape {values.shape} is not on the grid; it must be {grid.SHAPE}, or that and time"
        )
    if values.ndim == 4 and tr is None:
        raise InputError("an array with time needs a TR in seconds")
    image: Any = nib.Nifti1Image(values, grid.AFFINE)
    _say_where(image.header, grid.AFFINE, tr)
    return image


def export_run(
    folder: str | Path,
    run_id: str,
    path: str | Path,
    units: str = "original",
    start: int = 0,
    frames: int | None = None,
    array: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> None:
    """Write a stored run, or an array made from it, as NIfTI on the grid.

    Args:
        folder: the prepared store.
        run_id: the run, whose voxels, TR, means and SDs are used.
        path: .nii or .nii.gz to write; background is 0.
        units: "original", those of the run's file; or "z" by the run's mean and SD. An array is left as it is by "z"
            (right for attribution maps).
        start: first frame.
        frames: how many; None takes all from `start`.
        array: .npy or .pt file on the grid (see `to_nifti`) to write instead of the run's own frames; with time, it
            begins at the run's frame `start`.
        checkpoint: the array was made by this network, in the units that it sees (see
            `bundle.data.normalisation`); None: in the run's z.

    Raises:
        InputError: no such run or frames, a wrong name or unit, an array that is not on the grid, or a file that
            cannot be written; nothing half-written is left.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path} must end in .nii or .nii.gz")
    if units not in UNITS:
        raise InputError(f"units must be {' or '.join(UNITS)}, not {units!r}")
    record = store.read_run(folder, run_id)
    voxels = store.read_voxels(folder, run_id)
    moments = store.read_moments(folder, run_id)
    if array is None:
        count = record["frames"] - start if frames is None else frames
        rows = store.read_clip(folder, run_id, start, count)  # (T, V)
        scale = moments if units == "original" else run_moments(moments, record)
        with written_whole(path) as unfinished:
            _write_frames(unfinished, rows, voxels, record["tr"], *scale)
        return
    image: Any = to_nifti(_load(Path(array)), tr=record["tr"])
    if units == "original":
        values = image.get_fdata(dtype=np.float32).reshape(-1, *image.shape[3:])[voxels].T  # (T, V) or (V,)
        if checkpoint is not None:
            stored = store.read_clip(folder, run_id, start, len(np.atleast_2d(values))).astype(np.float32)
            normalisation = Normalisation(**saved_facts(load_checkpoint(checkpoint), checkpoint)["normalisation"])
            in_torch = [torch.from_numpy(part) for part in (values, stored, run_moments(moments, record))]
            values = normalisation.undo(*in_torch).numpy()
        image = to_nifti(values * record["sd"] + record["mean"], voxels, record["tr"])
    with written_whole(path) as unfinished:
        nib.save(image, unfinished)


def _write_frames(path: Path, rows: NDArray, voxels: NDArray, tr: float, mean: NDArray, sd: NDArray) -> None:
    """Write (T, V) frame by frame: a dense run of 1000 frames would take 3.5 GB of memory."""
    header: Any = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((*grid.SHAPE, len(rows)))
    _say_where(header, grid.AFFINE, tr)
    header["vox_offset"] = 352
    frame = np.zeros(grid.SHAPE, np.float32)
    with ImageOpener(str(path), "wb") as file:
        header.write_to(file)  # with the empty extension, 352 bytes
        for row in rows:
            frame.ravel()[voxels] = row.astype(np.float64) * sd + mean
            file.write(frame.tobytes(order="F"))


def _say_where(header: Any, affine: NDArray, tr: float | None) -> None:
    header.set_sform(affine, MNI_CODE)
    header.set_qform(affine, MNI_CODE)
    header.set_xyzt_units("mm", "sec")
    if tr is not None and header["dim"][0] == 4:
        header["pixdim"][4] = tr


def _load(path: Path) -> NDArray:
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        if path.suffix == ".npy":
            return np.load(path)
        return torch.as_tensor(torch.load(path, map_location="cpu", weights_only=True)).float().numpy()
    except (ValueError, OSError, EOFError, TypeError, RuntimeError, UnpicklingError) as error:
        raise InputError(f"{path} is not an array; give a .npy file or a tensor saved as .pt") from error
