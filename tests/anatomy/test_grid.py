"""The grid against nilearn, scipy and nibabel, and against what a linear function of the world must give.

Pitfall 1. Not covered here: reading files (test_bold.py) and the atlas's labels (test_atlas.py).
"""

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn.datasets import load_mni152_brain_mask
from nilearn.image import resample_img
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from bundle.anatomy import grid

FSL_BOX = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])  # LAS, 91 x 109 x 91
BOX_SHAPE = (91, 109, 91)
ORIENTATIONS = ["RAS", "LAS", "LPS", "LSP", "PIR", "ASL", "SRA", "IPL"]
SIZE = int(np.prod(grid.SHAPE))


def world(voxels: np.ndarray, affine: np.ndarray = grid.AFFINE, shape: tuple = grid.SHAPE) -> np.ndarray:
    return nib.affines.apply_affine(affine, np.stack(np.unravel_index(voxels, shape), axis=1))


def stored_as(data: np.ndarray, affine: np.ndarray, axcodes: str) -> nib.Nifti1Image:
    """The same image in another storage order, by nibabel."""
    start = nib.io_orientation(affine)
    transform = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axcodes))
    return nib.Nifti1Image(data, affine).as_reoriented(transform)


def interpolate(data: np.ndarray, affine: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    return grid.linear_operator(affine, data.shape, voxels) @ data.ravel()


@st.composite
def affines(draw):
    """Oblique, flipped, permuted and anisotropic affines over the middle of the grid."""
    rotation = Rotation.from_euler("xyz", draw(st.tuples(*[st.floats(-40, 40)] * 3)), degrees=True).as_matrix()
    zooms = draw(st.tuples(*[st.floats(1.5, 6)] * 3)) * np.array(draw(st.tuples(*[st.sampled_from([-1, 1])] * 3)))
    linear = rotation @ np.diag(zooms)[:, list(draw(st.permutations(range(3))))]
    centre = np.array(draw(st.tuples(*[st.floats(-20, 20)] * 3)))
    return nib.affines.from_matvec(linear, centre - linear @ (np.array([14, 15, 16]) / 2))


SMALL = (15, 16, 17)


def test_the_grid_is_the_published_one():
    assert grid.SHAPE == (96, 96, 96)
    assert np.array_equal(grid.AFFINE, [[2, 0, 0, -94], [0, 2, 0, -114], [0, 0, 2, -78], [0, 0, 0, 1]])
    assert nib.aff2axcodes(grid.AFFINE) == ("R", "A", "S")


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_mni_box_is_copied_bit_by_bit_in_any_storage_order(axcodes):
    data = np.random.default_rng(0).normal(size=BOX_SHAPE).astype(np.float32)
    stored = stored_as(data, FSL_BOX, axcodes)
    voxels = np.flatnonzero(grid.covered(stored.affine, stored.shape))
    # crop and pad by array: x is flipped to RAS and starts 2 voxels in, y loses 6, z starts 3 voxels in
    expected = np.zeros(grid.SHAPE, np.float32)
    expected[2:93, :, 3:94] = data[::-1, 6:102, :]
    operator = grid.linear_operator(stored.affine, stored.shape, voxels)
    assert operator.nnz == len(voxels) == 91 * 96 * 91
    got = np.zeros(SIZE, np.float32)
    got[voxels] = operator @ np.asarray(stored.dataobj).ravel()
    assert np.array_equal(got.reshape(grid.SHAPE), expected)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_a_linear_function_of_the_world_comes_out_exactly(axcodes):
    affine = nib.affines.from_matvec(np.diag([3.0, 3.5, 4.0]), [-80.0, -110.0, -70.0])
    shape = (50, 55, 45)
    x, y, z = nib.affines.apply_affine(affine, np.indices(shape).reshape(3, -1).T).T
    data = (2 * x - 3 * y + 0.5 * z + 7).reshape(shape).astype(np.float32)
    stored = stored_as(data, affine, axcodes)
    positions = nib.affines.apply_affine(np.linalg.inv(affine), world(np.arange(SIZE)))
    inner = np.flatnonzero(((positions >= 0) & (positions <= np.array(shape) - 1)).all(axis=1))
    x, y, z = world(inner).T
    got = interpolate(np.asarray(stored.dataobj), stored.affine, inner)
    np.testing.assert_allclose(got, 2 * x - 3 * y + 0.5 * z + 7, atol=1e-3)


@settings(max_examples=8, deadline=None)
@given(affine=affines(), seed=st.integers(0, 2**16))
def test_interpolation_agrees_with_scipy_and_nilearn(affine, seed):
    data = np.random.default_rng(seed).normal(size=SMALL).astype(np.float32)
    to_input = np.linalg.inv(affine) @ grid.AFFINE
    expected = affine_transform(data, to_input, output_shape=grid.SHAPE, order=1, mode="nearest")
    covered = np.flatnonzero(grid.covered(affine, SMALL))
    got = interpolate(data, affine, covered)
    # positions are snapped within 1e-4 voxel, so neighbours' difference times 1e-4 is the tolerance
    np.testing.assert_allclose(got, expected.ravel()[covered], atol=2e-3)

    nilearn = resample_img(
        nib.Nifti1Image(data, affine), grid.AFFINE, grid.SHAPE, interpolation="linear", fill_value=np.nan,
        force_resample=True, copy_header=True,
    ).get_fdata().ravel()[covered]  # fmt: skip
    inside = np.isfinite(nilearn)
    np.testing.assert_allclose(got[inside], nilearn[inside], atol=2e-3)


@settings(max_examples=8, deadline=None)
@given(affine=affines(), seed=st.integers(0, 2**16))
def test_nearest_agrees_with_scipy_away_from_ties(affine, seed):
    labels = np.random.default_rng(seed).integers(1, 100, SMALL).astype(np.int32)
    to_input = np.linalg.inv(affine) @ grid.AFFINE
    positions = nib.affines.apply_affine(to_input, np.indices(grid.SHAPE).reshape(3, -1).T)
    clear = (np.abs(positions - np.floor(positions) - 0.5) > 1e-3).all(axis=1).reshape(grid.SHAPE)
    expected = affine_transform(labels, to_input, output_shape=grid.SHAPE, order=0, mode="grid-constant")
    got = grid.nearest(labels, affine)
    assert np.array_equal(got[clear], expected[clear])
    assert got.dtype == labels.dtype
    assert np.array_equal((got > 0)[clear], grid.covered(affine, SMALL)[clear])


def test_nearest_agrees_with_nibabel_into_another_space():
    labels = np.random.default_rng(1).integers(0, 9, (20, 21, 22)).astype(np.int16)
    affine = nib.affines.from_matvec(np.diag([-3.0, 2.5, 4.1]), [30.3, -20.2, -40.1])
    out_affine = nib.affines.from_matvec(Rotation.from_euler("z", 10, degrees=True).as_matrix() * 2.2, [-20, -10, -30])
    expected = nibabel.processing.resample_from_to(
        nib.Nifti1Image(labels, affine), ((12, 11, 10), out_affine), order=0
    ).get_fdata()
    assert np.array_equal(grid.nearest(labels, affine, out_affine, (12, 11, 10)), expected)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@pytest.mark.parametrize("zoom", [4.0, 3.0], ids=["half-way ties", "no ties"])
def test_storage_order_changes_no_bit(axcodes, zoom):
    affine = nib.affines.from_matvec(np.eye(3) * zoom, [-62.0, -70.0, -50.0])
    data = np.random.default_rng(2).normal(size=(31, 33, 32)).astype(np.float32)
    stored = stored_as(data, affine, axcodes)
    again = np.asarray(stored.dataobj)
    covered = grid.covered(affine, data.shape)
    assert np.array_equal(covered, grid.covered(stored.affine, stored.shape))
    voxels = np.flatnonzero(covered)
    assert np.array_equal(interpolate(data, affine, voxels), interpolate(again, stored.affine, voxels))
    assert np.array_equal(grid.nearest(data, affine), grid.nearest(again, stored.affine))


def test_covered_ends_half_a_voxel_outside_the_edge_centres():
    affine = nib.affines.from_matvec(np.eye(3) * 4, [0.0, 0.0, 0.0])
    covered = grid.covered(affine, (3, 4, 5))  # outer faces: -2 to 10, 14 and 18 mm
    points = world(np.flatnonzero(covered))
    assert points.min(axis=0).tolist() == [-2, -2, -2]
    assert points.max(axis=0).tolist() == [10, 14, 18]
    assert len(points) == 7 * 9 * 11


@settings(max_examples=10, deadline=None)
@given(affine=affines())
def test_weights_are_positive_and_sum_to_one(affine):
    voxels = np.flatnonzero(grid.covered(affine, SMALL))
    operator = grid.linear_operator(affine, SMALL, voxels)
    assert operator.shape == (len(voxels), np.prod(SMALL))
    assert operator.data.min() > 0
    np.testing.assert_allclose(operator @ np.ones(np.prod(SMALL), np.float32), 1, atol=1e-6)


def test_unusable_voxels_give_their_weight_to_the_other_corners():
    affine = nib.affines.from_matvec(np.eye(3) * 4, [0.0, 0.0, 0.0])
    usable = np.ones((4, 4, 4), bool)
    usable[2:] = False  # beyond x = 6 mm, the face of the last usable voxel
    data = np.where(usable, 5.0, 1e6).astype(np.float32)
    voxels = np.flatnonzero(grid.nearest(usable, affine))
    got = grid.linear_operator(affine, (4, 4, 4), voxels, usable) @ data.ravel()
    np.testing.assert_allclose(got, 5)


def test_mni_brain_is_nilearns():
    template = load_mni152_brain_mask(resolution=2)
    voxels = np.argwhere(np.asarray(template.dataobj) > 0)
    indices = nib.affines.apply_affine(np.linalg.inv(grid.AFFINE) @ template.affine, voxels).round().astype(int)
    expected = np.zeros(grid.SHAPE, bool)
    expected[tuple(indices.T)] = True
    assert np.array_equal(grid.mni_brain(), expected)
    assert grid.mni_overlap(expected) == 1
    half = expected.copy()
    half[:48] = False
    assert 0.4 < grid.mni_overlap(half) < 0.6
