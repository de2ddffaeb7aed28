"""The one fixed grid that every run, atlas and mask is brought onto, and the ways onto it.

96 x 96 x 96 voxels of 2 mm, RAS, the first voxel's centre at (-94, -114, -78) mm: the MNI152 2 mm box of
91 x 109 x 91 voxels, cropped and padded about its middle. Anatomy therefore always lies at the same index,
whatever the field of view, orientation or voxel size of a file. Orientation, spacing, crop and pad are one
step, through the affines; there is never a second interpolation.
"""

from functools import cache
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_brain_mask
from numpy.typing import NDArray
from scipy.sparse import csr_array

SHAPE = (96, 96, 96)
VOXEL_MM = 2.0
ORIGIN_MM = (-94.0, -114.0, -78.0)
AFFINE: NDArray[np.float64] = nib.affines.from_matvec(np.diag([VOXEL_MM] * 3), ORIGIN_MM)

SNAP = 1e-4  # voxels: a float32 affine's rounding must not turn a copy into an interpolation


class _Canonical(NamedTuple):
    """A stored array as if it were RAS: flat C-order index of RAS voxel k = offset + k @ strides."""

    affine: NDArray[np.float64]
    shape: NDArray[np.int64]
    strides: NDArray[np.int64]
    offset: int


def _canonical(affine: NDArray, shape: tuple[int, ...]) -> _Canonical:
    """Address a stored array by its RAS voxels, so that LAS and RAS storage of an image give equal bits."""
    orientation = nib.io_orientation(affine)  # per stored axis: the RAS axis it runs along, and +1 or -1
    axes, flips = orientation[:, 0].astype(int), orientation[:, 1].astype(int)
    stored_strides = np.array([shape[1] * shape[2], shape[2], 1])
    ras_shape, strides = np.empty(3, np.int64), np.empty(3, np.int64)
    ras_shape[axes] = shape
    strides[axes] = flips * stored_strides
    offset = int(np.sum(stored_strides * (np.array(shape) - 1) * (flips < 0)))
    return _Canonical(affine @ nib.orientations.inv_ornt_aff(orientation, shape), ras_shape, strides, offset)


def _positions(ras_affine: NDArray, out_affine: NDArray, out_voxels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where output voxels (3, V) lie in fractional RAS voxels of the input (3, V), snapped to whole ones."""
    linear, shift = nib.affines.to_matvec(np.linalg.inv(ras_affine) @ out_affine)
    positions = linear @ out_voxels.astype(np.float64) + shift[:, None]
    whole = np.rint(positions)
    return np.where(np.abs(positions - whole) < SNAP, whole, positions)


def _inside(positions: NDArray[np.float64], shape: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which positions (3, V) lie within the outer faces of the edge voxels: (V,)."""
    return np.all((positions >= -0.5 - SNAP) & (positions <= shape[:, None] - 0.5 + SNAP), axis=0)


def _all_voxels(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.indices(shape).reshape(3, -1)


def covered(affine: NDArray, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The grid voxels whose centres lie in a file's field of view (to the outer faces of its edge voxels).

    Args:
        affine: (4, 4), stored voxel to world, mm.
        shape: the file's three spatial sizes.

    Returns:
        A bool array of `SHAPE`.
    """
    source = _canonical(affine, shape)
    return _inside(_positions(source.affine, AFFINE, _all_voxels(SHAPE)), source.shape).reshape(SHAPE)


def linear_operator(
    affine: NDArray, shape: tuple[int, ...], voxels: NDArray, usable: NDArray[np.bool_] | None = None
) -> csr_array:
    """Trilinear interpolation at grid voxels, as one sparse matrix to multiply every frame with.

    Positions within 1e-4 of a whole voxel count as whole, so a file that lies on the grid's lattice is copied
    bit by bit. In the half voxel between the edge voxels' centres and their outer faces the edge value holds.

    Args:
        affine: (4, 4), stored voxel to world, mm.
        shape: the file's three spatial sizes.
        voxels: (V,) flat C-order indices into `SHAPE`, each one `covered`.
        usable: optional bool array of `shape`; False voxels (NaN background) get no weight and the other
            corners share theirs. The nearest voxel of every grid voxel must be usable.

    Returns:
        A float32 matrix (V, prod(shape)) whose columns are the stored voxels in C order; each row sums to 1.
    """
    source = _canonical(affine, shape)
    points = np.stack(np.unravel_index(np.asarray(voxels), SHAPE))  # (3, V)
    positions = _positions(source.affine, AFFINE, points)
    assert _inside(positions, source.shape).all(), "a grid voxel outside the field of view"
    last = source.shape[:, None] - 1
    positions = np.clip(positions, 0, last)
    low = np.floor(positions).astype(np.int64)
    high = np.minimum(low + 1, last)
    above = positions - low  # share of the upper corner along each axis

    indices = np.empty((len(voxels), 8), np.int32)
    weights = np.empty((len(voxels), 8), np.float64)
    for corner in range(8):
        upper = np.array([[corner >> axis & 1] for axis in range(3)], bool)
        indices[:, corner] = source.offset + source.strides @ np.where(upper, high, low)
        weights[:, corner] = np.where(upper, above, 1 - above).prod(axis=0)
    if usable is not None:
        weights *= usable.ravel()[indices]
        weights /= weights.sum(axis=1, keepdims=True)
    rows = np.arange(len(voxels) + 1, dtype=np.int64) * 8
    operator = csr_array(
        (weights.astype(np.float32).ravel(), indices.ravel(), rows), shape=(len(voxels), int(np.prod(shape)))
    )
    operator.eliminate_zeros()
    return operator


def nearest(
    labels: NDArray, affine: NDArray, out_affine: NDArray = AFFINE, out_shape: tuple[int, ...] = SHAPE
) -> NDArray:
    """Bring labels or a mask into another space by nearest neighbour in world space.

    A position half-way between two voxels takes the one further right, anterior or superior, however the
    array is stored, so that two storage orders of one atlas agree to the voxel.

    Args:
        labels: a 3D array.
        affine: (4, 4), its voxel to world, mm.
        out_affine: (4, 4), the wanted space's voxel to world, mm.
        out_shape: the wanted three sizes.

    Returns:
        An array of `out_shape` and the type of `labels`, 0 outside the labels' field of view.
    """
    source = _canonical(np.asarray(affine, np.float64), labels.shape)
    positions = _positions(source.affine, np.asarray(out_affine, np.float64), _all_voxels(out_shape))
    inside = _inside(positions, source.shape)
    rounded = np.floor(positions[:, inside] + 0.5 + SNAP).astype(np.int64)
    closest = np.clip(rounded, 0, source.shape[:, None] - 1)
    out = np.zeros(len(inside), labels.dtype)
    out[inside] = labels.ravel()[source.offset + source.strides @ closest]
    return out.reshape(out_shape)


@cache
def mni_brain() -> NDArray[np.bool_]:
    """The MNI152 brain mask (nilearn's, 2 mm) on the grid: a bool array of `SHAPE`; read-only."""
    image = load_mni152_brain_mask(resolution=2)
    brain = nearest(np.asarray(image.dataobj) > 0, image.affine)
    brain.setflags(write=False)
    return brain


def mni_overlap(brain: NDArray[np.bool_]) -> float:
    """The share, 0 to 1, of the MNI152 brain mask's voxels that a run's brain (bool, `SHAPE`) contains."""
    return float(np.mean(brain[mni_brain()]))


def share_in_mni_brain(labels: NDArray, affine: NDArray) -> float:
    """The share, 0 to 1, of a label image's labelled volume that lies in the MNI152 brain mask.

    Args:
        labels: a 3D array; 0 is no label, and at least one voxel has one.
        affine: (4, 4), its voxel to world, mm.
    """
    voxels = np.argwhere(labels)
    voxels = voxels[:: max(1, len(voxels) // 100_000)]  # evenly spread, and more than enough for a share
    places = nib.affines.apply_affine(np.linalg.inv(AFFINE) @ np.asarray(affine, np.float64), voxels)
    places = np.floor(places + 0.5).astype(np.int64)
    inside = np.all((places >= 0) & (places < SHAPE), axis=1)
    return float(mni_brain()[tuple(places[inside].T)].sum() / len(voxels))
