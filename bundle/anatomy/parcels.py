"""Parcels of an atlas on the grid, and values between brain voxels and dense images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, Atlas, Regions, labels_on, load_atlas, region_labels

OTHER = "insula"
"""Name of the group of labels that are in none of the seven regions (of AAL3: the insula)."""

Parcels = Mapping[str, tuple[int, ...]]
"""Label numbers of each parcel, by its name."""


def parcels_of(atlas: Atlas, level: str) -> dict[str, tuple[int, ...]]:
    """The parcels of a level: "group" (the seven regions and the insula) or "label" (each label by itself)."""
    if level == "label":
        return {name: (number,) for number, name in atlas.names.items()}
    groups = {name: tuple(n for n in numbers if n in atlas.names) for name, numbers in REGIONS.items()}
    rest = tuple(set(atlas.names).difference(*groups.values()))
    return {name: numbers for name, numbers in (groups | {OTHER: tuple(sorted(rest))}).items() if numbers}


def parcel_index(atlas: Atlas, parcels: Parcels) -> NDArray[np.int64]:
    """Which parcel each voxel of the grid belongs to: `grid.SHAPE`, 0 for none, 1 for the first; the last one wins."""
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    table = np.zeros(max(labels.max(), *atlas.names) + 1, np.int64)
    for position, numbers in enumerate(parcels.values(), start=1):
        table[list(numbers)] = position
    return table[labels]


def region_index(regions: Sequence[Regions], atlas: str | Path | None = None) -> NDArray[np.int64]:
    """`parcel_index` of regions by name, label name or number (see `region_labels`); atlas None: AAL3v1, 1 mm."""
    loaded = load_atlas(atlas)
    return parcel_index(loaded, {str(region): region_labels(region, loaded.names) for region in regions})


def label_map(values: Mapping[str, float], atlas: Atlas) -> nib.Nifti1Image:
    """Paint each label's value on the grid (MNI, 2 mm); voxels without a label are 0."""
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    table = np.zeros(labels.max() + 1, np.float32)
    for number, name in atlas.names.items():
        table[number] = values.get(name, 0.0)
    return nib.Nifti1Image(np.nan_to_num(table[labels]), grid.AFFINE)


def dense(values: NDArray, voxels: NDArray, fill: float = 0) -> NDArray:
    """Put values of brain voxels (..., V) on the grid: (..., X, Y, Z) of the same type.

    Args:
        values: the values, voxels last.
        voxels: (V,) flat C-order indices into `grid.SHAPE`, as a store keeps them.
        fill: value elsewhere.
    """
    values = np.asarray(values)
    image = np.full((*values.shape[:-1], int(np.prod(grid.SHAPE))), fill, values.dtype)
    image[..., voxels] = values
    return image.reshape(*values.shape[:-1], *grid.SHAPE)
