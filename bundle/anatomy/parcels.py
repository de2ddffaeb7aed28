"""Parcels of an atlas on the grid, and values between brain voxels and dense images."""

from collections.abc import Mapping, Sequence

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.anatomy.atlas import Atlas, Regions, labels_on, region_labels

Parcels = Mapping[str, tuple[int, ...]]
"""Label numbers of each parcel, by its name."""


def parcels_of(atlas: Atlas, level: str) -> dict[str, tuple[int, ...]]:
    """The parcels of a level: "group" (the groups, and the rest: AAL3's insula) or "label" (each label by itself)."""
    if level == "label":
        return {name: (number,) for number, name in atlas.names.items()}
    rest = set(atlas.names).difference(*atlas.groups.values())
    return atlas.groups | ({atlas.rest: tuple(sorted(rest))} if rest else {})


def parcel_index(atlas: Atlas, parcels: Parcels) -> NDArray[np.int64]:
    """Which parcel each voxel of the grid belongs to: `grid.SHAPE`, 0 for none, 1 for the first; the last one wins."""
    values = dict.fromkeys(atlas.names, 0)
    for position, numbers in enumerate(parcels.values(), start=1):
        values |= dict.fromkeys(numbers, position)
    return _painted(atlas, list(values.values()), np.dtype(np.int64))


def region_index(regions: Sequence[Regions], atlas: Atlas) -> NDArray[np.int64]:
    """`parcel_index` of regions by name, label name or number (see `region_labels`)."""
    return parcel_index(atlas, {str(region): region_labels(region, atlas) for region in regions})


def label_map(values: Mapping[str, float], atlas: Atlas) -> nib.Nifti1Image:
    """Paint each label's value on the grid (MNI, 2 mm, and its header says so); voxels without a label are 0."""
    painted = _painted(atlas, [values.get(name, 0.0) for name in atlas.names.values()], np.dtype(np.float32))
    image = nib.Nifti1Image(np.nan_to_num(painted), grid.AFFINE)
    image.set_sform(grid.AFFINE, "mni")
    image.set_qform(grid.AFFINE, "mni")
    return image


def parcel_map(values: Mapping[str, float], atlas: Atlas, level: str) -> nib.Nifti1Image:
    """`label_map` of the values of a level's parcels, see `parcels_of`."""
    parcels = parcels_of(atlas, level)
    return label_map({atlas.names[n]: value for name, value in values.items() for n in parcels[name]}, atlas)


def _painted(atlas: Atlas, values: Sequence[float], dtype: np.dtype) -> NDArray:
    """An array of `grid.SHAPE` with the value of each label, in the order of `Atlas.names`; 0 without a label."""
    numbers, painted = np.array([0, *atlas.names]), np.array([0, *values], dtype)
    order = np.argsort(numbers)
    places = np.searchsorted(numbers[order], labels_on(atlas, grid.AFFINE, grid.SHAPE))
    return painted[order][places]


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
