"""Atlases: a label image in MNI space, the names and groups of its labels, and regions in an image.

One thing names an atlas: the word of a known one (`AAL3`, the default; see `known_atlases`), or the path of a label
image with its table beside it, as BIDS has it: `X_dseg.nii.gz` with `X_dseg.tsv`.

Labels are placed in world space (RAS, mm): `labels_on` brings them to any image by that image's affine, never
by array index, so the orientation an atlas file happens to be stored in changes nothing.
"""

import difflib
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bundle.anatomy import grid
from bundle.anatomy.known_atlases import AAL3, KNOWN, KNOWN_WORDS, aal3_names, known_atlas
from bundle.anatomy.label_tables import ALL, OTHER, Groups, LabelTable, known_groups, read_table
from bundle.errors import InputError

logger = logging.getLogger(__name__)

# One region name, label name or label number, or a list of these.
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
"""AAL3's groups, by label number: arXiv 2511.00443, Table 1. The insula (33, 34) is in none; 35, 36, 81, 82 are not
used."""
_AAL3_GROUPS = Groups(REGIONS, "insula")

LEAST_IN_BRAIN = 0.8
"""Share of an atlas's labelled volume that has to lie in the MNI152 brain mask. AAL3 has 0.95, AAL116 0.94, each of
their groups alone 0.88 or more; moved by 3 cm along any axis, they have at most 0.69, their cortex alone at most 0.74
(`tests/anatomy/test_atlas.py`). A small atlas that is moved within the brain is not noticed."""
_LEAST_LIKE_AAL3 = 0.5  # share of an image's labelled voxels on the grid that have AAL3's label


@dataclass(frozen=True, eq=False)
class Atlas:
    """A label image in world space.

    Attributes:
        labels: label numbers `(X, Y, Z)`, int32, as stored; 0 outside all labels.
        affine: `(4, 4)`, voxel index to mm.
        names: name of each label number that has a voxel, in the table's order.
        groups: label numbers of each group (lobe, network, ...), of those that have a voxel; a label is in one or none.
        source: the file.
        sha256: hash of all of these but `source`: of what an atlas is, wherever it lies and however it is compressed.
        rest: what the labels of no group are called together.
    """

    labels: np.ndarray
    affine: np.ndarray
    names: dict[int, str]
    groups: dict[str, tuple[int, ...]]
    source: str
    sha256: str
    rest: str = OTHER


def load_atlas(atlas: str | Path = AAL3) -> Atlas:
    """Read a label image with its names and groups; each is read, and logged, once per process.

    Args:
        atlas: one of `KNOWN`, or the path of a 3D NIfTI label image in MNI space. Its table (see
            `label_tables.read_table`) has the same name with .tsv or .txt, or that without the BIDS entities res and
            space. An image without a table has to be AAL3.

            Groups are those of the table's column `group`. Without that column they are those that are known of labels
            of these names (see `label_tables.known_groups`), else each label is a group by itself.

    Raises:
        InputError: a file is missing, unreadable, not 3D, has labels that are not whole numbers, has no orientation in
            space, has no labelled voxel at all or labels that are not in the table; there is no table, or it cannot be
            read; the image is not in MNI space; or a known atlas can be found neither here nor on a network.
    """
    return _load(str(atlas))


def is_atlas(atlas: str | Path) -> bool:
    """Whether this is the word of a known atlas, or a file."""
    return str(atlas) in KNOWN or Path(atlas).is_file()


def located(atlas: str | Path, folder: str | Path = ".") -> str:
    """What names the same atlas from any working directory: a known word, or a path counted from a folder."""
    return str(atlas) if str(atlas) in KNOWN else str(Path(folder, atlas).absolute())


@lru_cache(maxsize=8)
def _load(atlas: str) -> Atlas:
    table: LabelTable | None = None
    source = Path(atlas)
    if atlas in KNOWN:
        source, known_names = known_atlas(atlas)
        table = LabelTable(known_names, None)
    image = _open(source)
    labels = _whole_numbers(image, source)
    present = np.unique(labels[labels != 0]).tolist()
    if not present:
        raise InputError(f"{source} has no labelled voxel; give an atlas whose labels are 1 or more")
    _refuse_other_space(labels, image.affine, source)
    table = table or _table_of(source, labels, image.affine)
    if unknown := [label for label in present if label not in table.names]:
        raise InputError(
            f"{source} holds labels that are not in its table, such as {unknown[:5]}; add them to the table"
        )
    names = {label: name for label, name in table.names.items() if label in set(present)}
    groups = table.groups or _groups_of(names)
    if groups is None and atlas in KNOWN:
        raise InputError(f"labels of {source} are named otherwise than those of {atlas}; give it as files, with groups")
    members, rest = groups or Groups({name: (label,) for label, name in names.items()}, OTHER)
    members = {group: tuple(label for label in own if label in names) for group, own in members.items()}
    members = {group: own for group, own in members.items() if own}
    labels.setflags(write=False)  # shared by everyone who loads this file
    digest = hashlib.sha256(json.dumps([labels.shape, image.affine.tolist(), names, members, rest]).encode())
    digest.update(labels.astype("<i4").tobytes())
    sha256 = digest.hexdigest()
    logger.info("atlas %s: %d labels in %d groups, sha256 %s", source, len(present), len(members), sha256)
    return Atlas(labels, image.affine, names, members, str(source), sha256, rest)


def _table_of(source: Path, labels: np.ndarray, affine: np.ndarray) -> LabelTable:
    """The label table beside an image; that of AAL3 if there is none and the image is AAL3."""
    stem = re.sub(r"\.(nii(\.gz)?|hdr|img)$", "", source.name)
    stems = [stem, re.sub(r"_res-[^_]+", "", stem), re.sub(r"_(res|space)-[^_]+", "", stem)]
    for path in [source.with_name(f"{name}{ending}") for name in dict.fromkeys(stems) for ending in (".tsv", ".txt")]:
        if path.is_file():
            return read_table(path)
    if _is_aal3(labels, affine):
        return LabelTable(aal3_names(), _AAL3_GROUPS)
    raise InputError(
        f"{source} has no label table {stem}.tsv (columns index, name and, if you like, group) beside it, and is not "
        "AAL3, which needs none; write one"
    )


def _is_aal3(labels: np.ndarray, affine: np.ndarray) -> bool:
    """Whether most labelled voxels, on the grid, have the label that AAL3 has there, and no label is unknown to it."""
    aal3 = load_atlas()
    found, theirs = grid.nearest(labels, affine), labels_on(aal3, grid.AFFINE, grid.SHAPE)
    like = np.mean((found == theirs)[found > 0]) if found.any() else 0.0
    return bool(like >= _LEAST_LIKE_AAL3) and set(np.unique(labels)) <= {0, *aal3.names}


def _groups_of(names: dict[int, str]) -> Groups | None:
    """What is known of labels of these names; AAL3's are of these numbers too."""
    return _AAL3_GROUPS if names.items() <= aal3_names().items() else known_groups(names)


def _refuse_other_space(labels: np.ndarray, affine: np.ndarray, source: Path) -> None:
    """Raise `InputError` for labels that do not lie in the MNI brain, or a file name that says another space."""
    named = re.search(r"(?:^|_)(?:space|tpl)-([A-Za-z0-9+]+)", source.name)
    if named and not named[1].startswith("MNI"):
        raise InputError(f"the atlas {source} is in the space {named[1]} by its name; give one in MNI space")
    share = grid.share_in_mni_brain(labels, affine)
    if share < LEAST_IN_BRAIN:
        raise InputError(
            f"only {share:.0%} of the labelled volume of the atlas {source} lies in the MNI152 brain, where one in MNI "
            f"space has {LEAST_IN_BRAIN:.0%} or more; check its affine, or bring it to MNI space"
        )


def region_labels(regions: Regions, atlas: Atlas) -> tuple[int, ...]:
    """Return the label numbers, sorted, of regions given by name, label name, number or a list of these.

    Args:
        regions: "all" (groups), names of the atlas's groups, or names or numbers of its labels; several are combined.
        atlas: the atlas.

    Raises:
        InputError: nothing is given, or something is not in the atlas (with the nearest names).
    """
    wanted = [regions] if isinstance(regions, str | int) else list(regions)
    if not wanted:
        raise InputError(f"no region is given; choose from {_some(atlas.groups)}, or label names or numbers")
    numbers = {name: (number,) for number, name in atlas.names.items()} | atlas.groups
    numbers[ALL] = tuple(number for own in atlas.groups.values() for number in own)
    labels: set[int] = set()
    for region in wanted:
        if isinstance(region, str) and region in numbers:
            labels.update(numbers[region])
        elif isinstance(region, int) and region in atlas.names:
            labels.add(region)
        else:
            near = difflib.get_close_matches(str(region), numbers, n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else f"regions are {_some(atlas.groups)}"
            raise InputError(f"region {region!r} is not in the atlas {atlas.source}; {advice}")
    return tuple(sorted(labels))


def region_choices(regions: str | Sequence[Regions], atlas: Atlas) -> list[Any]:
    """The regions that are meant one by one: each of a list, or each of the atlas's groups for "all"."""
    if regions == ALL:
        return list(atlas.groups)
    return [regions] if isinstance(regions, str) else list(regions)


def _some(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def region_table(atlas: Atlas) -> list[dict]:
    """Sizes of the groups on the fixed 2 mm grid, so that atlas files of any voxel size compare.

    Returns:
        A row per group: `region`, `voxels`, `percent` of all labelled voxels, `labels` (numbers).
    """
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    numbers, counts = np.unique(labels[labels > 0], return_counts=True)
    voxels_of = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    rows = []
    for region, own in atlas.groups.items():
        voxels = sum(voxels_of.get(number, 0) for number in own)
        percent = 100 * voxels / max(int(counts.sum()), 1)
        rows.append({"region": region, "voxels": voxels, "percent": percent, "labels": own})
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


def region_coverage(atlas: Atlas, brain: np.ndarray) -> dict[str, float]:
    """Share (0 to 1) of each group that lies inside the brain mask of a run.

    Args:
        atlas: the atlas.
        brain: bool, on the fixed grid.

    Returns:
        One fraction per group that has a voxel on the grid.
    """
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    members = {group: np.isin(labels, own) for group, own in atlas.groups.items()}
    return {group: float(brain[inside].mean()) for group, inside in members.items() if inside.any()}


@lru_cache(maxsize=4)
def _labels_on_grid(atlas: Atlas) -> np.ndarray:
    labels = grid.nearest(atlas.labels, atlas.affine)
    labels.setflags(write=False)
    return labels


def _open(source: Path) -> nib.Nifti1Pair:
    if not source.is_file():
        raise InputError(
            f"the atlas {source} does not exist; give a label image (.nii, .nii.gz) or one of {KNOWN_WORDS}"
        )
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
