"""Small BOLD files for several test files: 8 mm voxels over the MNI152 box, so that a run takes milliseconds."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_brain_mask
from scipy.ndimage import affine_transform

COARSE_SHAPE = (25, 30, 25)
COARSE_AFFINE = nib.affines.from_matvec(np.diag([8.0, 8.0, 8.0]), [-98.0, -130.0, -80.0])


def touch(path: Path, content: str = "") -> Path:
    """Write a small text file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def coarse_brain() -> np.ndarray:
    """The MNI152 brain mask at 8 mm, by scipy."""
    template = load_mni152_brain_mask(resolution=2)
    to_template = np.linalg.inv(template.affine) @ COARSE_AFFINE
    values = np.asarray(template.dataobj, np.uint8)
    return affine_transform(values, to_template, output_shape=COARSE_SHAPE, order=0) > 0


def coarse_signal(frames: int = 30, seed: int = 0, mean: float = 1000.0, sd: float = 50.0) -> np.ndarray:
    """Noise about the mean in the brain, exactly 0 outside: (X, Y, Z, T) float32."""
    noise = np.random.default_rng(seed).normal(mean, sd, (*COARSE_SHAPE, frames))
    return (noise * coarse_brain()[..., None]).astype(np.float32)


def save_bold(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray = COARSE_AFFINE,
    tr: float = 0.8,
    unit: str | None = "sec",
    sform: int = 4,
    qform: int = 0,
    slope: float | None = None,
) -> Path:
    """Write a NIfTI file whose header says exactly what is asked for."""
    image: Any = nib.Nifti1Image(data, affine)
    if data.ndim == 4:
        image.header["pixdim"][4] = tr
    image.header.set_xyzt_units("mm", unit)
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def save_mask(path: Path, mask: np.ndarray, affine: np.ndarray = COARSE_AFFINE) -> Path:
    """Write a mask as uint8."""
    return save_bold(path, mask.astype(np.uint8), affine)


def save_derivatives(folder: Path, name: str, data: np.ndarray) -> Path:
    """Write a participant's run and brain mask as fMRIPrep names them; returns func/."""
    func = folder / name / "func"
    stem = f"{name}_task-rest_space-MNI152NLin2009cAsym_desc"
    save_bold(func / f"{stem}-preproc_bold.nii.gz", data)
    save_mask(func / f"{stem}-brain_mask.nii.gz", coarse_brain())
    return func


def run_of(path: Path, run_id: str = "sub-01", **changes: Any) -> dict[str, Any]:
    """A run as `bundle.preparation.sources` lists it."""
    run = {
        "run_id": run_id,
        "participant_id": run_id.split("_")[0],
        "bold": path,
        "mask": None,
        "confounds": None,
        "tr": None,
        "space": None,
        "site": "A",
        "diagnosis": 0,
        "participant": {"age": 10.5},
    }
    return run | changes


def save_three_and_a_truncated_one(folder: Path) -> Path:
    """Save a, b and c.nii.gz, and cut.nii.gz, which ends too early; returns the folder."""
    for seed, name in enumerate(("a", "b", "c", "cut")):
        save_bold(folder / f"{name}.nii.gz", coarse_signal(24, seed), tr=1.0)
    cut = folder / "cut.nii.gz"
    cut.write_bytes(cut.read_bytes()[:100_000])
    return folder


def status_of(summary: dict) -> dict[str, str]:
    """Of each run in a summary of `prepare`."""
    return {row["run_id"]: row["status"] for row in summary["rows"]}
