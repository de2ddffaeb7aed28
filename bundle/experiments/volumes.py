"""What all made-up runs share: scanner sites, MNI anatomy, noise, and files laid out like fMRIPrep derivatives."""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
from nilearn.image import resample_img

from bundle.anatomy.atlas import Atlas, labels_on, load_atlas
from bundle.errors import InputError
from bundle.experiments.patterns import label_pattern
from bundle.files import write_json

SIGNAL, NOISE, DRIFT = 0.01, 0.01, 0.003  # SD as a fraction of the voxel's mean
BOX_ORIGIN_MM, BOX_MM = np.array([-90, -126, -72]), np.array([180, 216, 180])  # the MNI152 91x109x91 2 mm box
SPACE = "MNI152NLin2009cAsym"


@dataclass(frozen=True)
class Site:
    """One scanner site.

    Attributes:
        name: written to the column `site`.
        tr: repetition time in seconds, 0.1 to 20.
        voxel_mm: edge of the cubic voxels in mm, 1 to 8.
        axcodes: orientation in which the voxels are stored, e.g. "LAS".
        intensity: about the mean of the brain's voxels, in arbitrary scanner units, positive.
        dtype: how the voxels are stored, "int16" (with a slope) or "float32".
    """

    name: str
    tr: float
    voxel_mm: float
    axcodes: str
    intensity: float
    dtype: str

    def __post_init__(self) -> None:
        """Refuse what cannot be written.

        Raises:
            InputError: a value is outside the range given above.
        """
        where = f"site {self.name!r}"
        if not 0.1 <= self.tr <= 20:
            raise InputError(f"tr of {where} must be 0.1 to 20 seconds, not {self.tr}.")
        if not 1 <= self.voxel_mm <= 8:
            raise InputError(f"voxel_mm of {where} must be 1 to 8 mm, not {self.voxel_mm}.")
        if len(self.axcodes) != 3 or any(len({*pair} & {*self.axcodes}) != 1 for pair in ("LR", "PA", "IS")):
            raise InputError(f"axcodes of {where} must be like 'RAS' or 'LAS', not {self.axcodes!r}.")
        if not 0 < self.intensity < math.inf:
            raise InputError(f"intensity of {where} must be a positive number, not {self.intensity}.")
        if self.dtype not in ("int16", "float32"):
            raise InputError(f"dtype of {where} must be 'int16' or 'float32', not {self.dtype!r}.")


@dataclass(frozen=True)
class Anatomy:
    """What all subjects of a site share; v counts the voxels of the brain, in C order of `mask`."""

    affine: np.ndarray  # (4, 4), RAS, voxel to MNI mm
    mask: np.ndarray  # (X, Y, Z) bool, the brain
    mean: np.ndarray  # (v,) float32, about 1: dark white matter, bright fluid
    labels: np.ndarray  # (v,) int, number in the atlas (AAL3), 0 where there is none
    mm: np.ndarray  # (v, 3) float32, MNI coordinates
    pattern: np.ndarray  # (v,) float32, of RMS 1 in each label; the sum of mean * pattern over a label is 0


def site_anatomy(voxel_mm: float, atlas: Atlas | None = None) -> Anatomy:
    """Sample the MNI152 template, its brain mask and an atlas on a RAS grid over the MNI152 box.

    The T1-weighted template becomes a T2*-like contrast, `1.5 - T1`: bright fluid, dark white matter.

    Args:
        voxel_mm: edge of the cubic voxels in mm.
        atlas: labels in MNI space; None takes AAL3.
    """
    affine = np.diag([voxel_mm] * 3 + [1.0])
    affine[:3, 3] = BOX_ORIGIN_MM
    shape = tuple(int(n) for n in BOX_MM // voxel_mm + 1)
    options = {"target_affine": affine, "target_shape": shape, "force_resample": True, "copy_header": True}
    template = resample_img(load_mni152_template(2), interpolation="linear", **options).get_fdata()
    mask = resample_img(load_mni152_brain_mask(2), interpolation="nearest", **options).get_fdata() > 0
    mean = (1.5 - template[mask]).astype(np.float32)
    labels = labels_on(atlas or load_atlas(), affine, shape)[mask]
    mm = nib.affines.apply_affine(affine, np.argwhere(mask)).astype(np.float32)
    return Anatomy(affine, mask, mean, labels, mm, label_pattern(mm, labels, mean))


def of_voxels(courses: np.ndarray, numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give each voxel the course of its label.

    Args:
        courses: (frames, n), a column per label.
        numbers: (n,) label numbers of the columns.
        labels: (v,) label number of each voxel.

    Returns:
        (v, frames) float32, 0 in voxels of no such label.
    """
    table = np.zeros((max(labels.max(), *numbers) + 1, len(courses)), dtype=np.float32)
    table[numbers] = courses.T
    return table[labels]


def add_noise(change: np.ndarray, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Add white noise and drift to the fractional change, (v, frames) float32, in place."""
    change += NOISE * rng.standard_normal(change.shape, dtype=np.float32)
    # the drift is linear in time, and its slope is a smooth (linear) function of the place in the brain
    slope = rng.standard_normal() + anatomy.mm @ (rng.standard_normal(3) / 50)
    ramp = np.linspace(-1, 1, change.shape[1]) * math.sqrt(3)
    change += (DRIFT * slope[:, None] * ramp).astype(np.float32)


@contextmanager
def written_cohort(folder: Path) -> Iterator[Path]:
    """Give a folder to write in, which takes the place of the one named, absent or empty, when all is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        draft = Path(temporary) / "cohort"
        draft.mkdir()
        yield draft
        draft.rename(folder)  # atomic; replaces an empty folder


def is_written(folder: Path, record: str, parameters: dict[str, Any], subjects: Iterable[str]) -> bool:
    """Whether the folder holds this very cohort already.

    Args:
        folder: of the cohort.
        record: name of its JSON file that holds its `parameters`.
        parameters: what the cohort is made with.
        subjects: participant_id of everyone in it.

    Raises:
        InputError: the path is a file, or the folder holds another cohort, a part of one, or anything else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a new or empty folder.")
    if not any(folder.iterdir()):
        return False
    path = folder / record
    if not path.is_file():
        raise InputError(f"{folder} holds other files; name a new or empty folder.")
    if json.loads(path.read_text()).get("parameters") != parameters:
        raise InputError(f"{folder} holds a cohort made with other parameters; name another folder.")
    missing = [name for name in subjects if not any(folder.glob(f"{name}/func/*_bold.nii.gz"))]
    if missing:
        raise InputError(f"{folder} is not complete, {missing[0]} is missing; delete it and run again.")
    return True


def write_description(folder: Path, name: str, function: str) -> None:
    """Write BIDS' dataset_description.json for derivatives of this name that a function has made."""
    description: dict[str, Any] = {
        "Name": name,
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "brain-fmri-roi-mae", "Description": function}],
    }
    write_json(folder / "dataset_description.json", description)


def write_run(folder: Path, name: str, task: str, values: np.ndarray, site: Site, anatomy: Anatomy) -> Path:
    """Write a run, its brain mask and sidecar as fMRIPrep names them.

    Args:
        folder: of the derivatives.
        name: participant_id, like "sub-01".
        task: the name's task entity.
        values: (v, frames) float32 BOLD signal of the brain's voxels, of mean about 1.
        site: how the run is stored.
        anatomy: where the voxels lie.

    Returns:
        The folder of the files.
    """
    func = folder / name / "func"
    func.mkdir(parents=True)
    stem = f"{name}_task-{task}_space-{SPACE}"
    values = site.intensity * values
    slope = site.intensity / 8000  # int16 reaches 4 times the mean; a step is about 1/80 of the signal's SD
    if site.dtype == "int16":
        values = np.round(values / slope)
    data = np.zeros((*anatomy.mask.shape, values.shape[1]), dtype=site.dtype)  # (X, Y, Z, T)
    data[anatomy.mask] = values
    image = stored_image(data, anatomy.affine, site)
    if site.dtype == "int16":
        image.header.set_slope_inter(slope, 0)  # nibabel then stores the integers as they are
    nib.save(image, func / f"{stem}_desc-preproc_bold.nii.gz")
    mask = stored_image(anatomy.mask.astype(np.uint8), anatomy.affine, site)
    nib.save(mask, func / f"{stem}_desc-brain_mask.nii.gz")
    sidecar = {"TaskName": task, "RepetitionTime": site.tr, "SkullStripped": True}
    write_json(func / f"{stem}_desc-preproc_bold.json", sidecar)
    return func


def stored_image(data: np.ndarray, affine: np.ndarray, site: Site) -> nib.Nifti1Image:
    """Wrap RAS voxels, (X, Y, Z) or (X, Y, Z, T), as an MNI image in the site's storage order."""
    image = nib.Nifti1Image(data, affine)
    to_site = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(site.axcodes))
    return in_mni(image.as_reoriented(to_site), site.tr)


def in_mni(image: nib.Nifti1Image, tr: float) -> nib.Nifti1Image:
    """Let an image's header say that its affine is MNI's, in mm and seconds, and what the TR is if it has frames."""
    image.set_sform(image.affine, code="mni")
    image.set_qform(image.affine, code="mni")
    image.header.set_xyzt_units("mm", "sec")
    if image.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    return image
