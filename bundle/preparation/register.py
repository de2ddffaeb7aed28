"""A run in its own space to MNI152: rigid motion correction, one affine transform, and a check that can fail.

No substitute for fMRIPrep: no distortion correction, no slice timing, no T1, no warp. A warp of the EPI itself (SyN) is
left out on purpose: it pulls tissue into dropout, and scores better by the measures below while being worse.

World coordinates are RAS, mm, throughout; SimpleITK is given them as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.datasets import load_mni152_template
from nilearn.masking import compute_epi_mask
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.preparation.bold import Bold, one_line
from bundle.preparation.confounds import framewise_displacement

METHODS = ("affine",)
SMOOTH_MM = 4.0  # SD of the Gaussian, so that a step of Gauss and Newton sees further than a voxel
CONVERGED_MM = 0.005  # a shorter step, also of a point 50 mm from the axis, ends the search
MOST_STEPS = 50
BINS = 32  # of each axis of the joint histogram
MARGIN_MM = 4.0  # how far from the MNI152 brain mask a voxel may be that counts as brain
EDGE_MM = 3.0  # SD of the Gaussian under the gradients that are compared
COARSE = 2  # images are compared at every second voxel of the grid along each axis
COARSE_AFFINE: NDArray[np.float64] = grid.AFFINE @ np.diag([COARSE, COARSE, COARSE, 1.0])
COARSE_SHAPE = (48, 48, 48)
Matrix = NDArray[np.float64]
Frames = Callable[[], Iterator[NDArray]]


@dataclass(frozen=True)
class Registered:
    """How a run lies in MNI152.

    Attributes:
        affines: (T, 4, 4), of each frame, its voxels to MNI world, mm: motion and affine in one.
        brain: bool, `grid.SHAPE`: the EPI's brain, in the field of view at every frame.
        confounds: a row per frame, columns as fMRIPrep's: trans_x ... (mm), rot_x ... (radians, about the middle of the
            field of view), framewise_displacement (mm; none at the first frame).
        alignment: see `alignment`.
    """

    affines: Matrix
    brain: NDArray[np.bool_]
    confounds: pd.DataFrame
    alignment: dict[str, float]


def register(bold: Bold, read: Frames) -> Registered:
    """Estimate where each frame of a run lies in MNI152.

    Args:
        bold: the run, in its own space.
        read: its `frames.frame_reader`.

    Raises:
        InputError: NaN or Inf, a frame that cannot be aligned, no brain, or no overlap with the template.
    """
    motion, mean = _motion(bold, read)
    try:
        found = compute_epi_mask(nib.Nifti1Image(mean.astype(np.float32), bold.affine))
    except ValueError as error:  # nilearn finds nothing bright
        raise InputError(f"{bold.path}: no brain is found in its mean ({one_line(error)}); look at it") from error
    head = ndimage.binary_fill_holes(np.asarray(found.dataobj) > 0)
    to_native = _to_template(bold, np.where(head, mean, 0))
    affines = np.linalg.inv(motion @ to_native) @ bold.affine
    still = np.linalg.inv(to_native) @ bold.affine  # of the frame that the others were aligned with
    reach = ndimage.binary_dilation(grid.mni_brain(), iterations=round(MARGIN_MM / grid.VOXEL_MM))
    brain = grid.nearest(head, still) & reach
    voxels = np.argwhere(brain)
    for affine in affines:
        places = nib.affines.apply_affine(np.linalg.inv(affine) @ grid.AFFINE, voxels)
        brain[tuple(voxels.T)] &= np.all((places >= -0.5) & (places <= np.array(bold.shape) - 0.5), axis=1)
    return Registered(affines, brain, _confounds(motion, bold), alignment(mean, still))


def _motion(bold: Bold, read: Frames) -> tuple[Matrix, NDArray[np.float64]]:
    """Rigid motion by least squares (Gauss and Newton, as in Friston et al. 1995, Hum Brain Mapp 3:165).

    The gradient is that of the reference, so that it is made once (inverse compositional: Baker and Matthews 2004,
    Int J Comput Vis 56:221). A common factor of the intensities is fitted beside.

    Returns:
        (T, 4, 4), from the world of the middle frame to that of each frame, and the mean (X, Y, Z) of the frames
        as they then lie.
    """
    affine, inverse = bold.affine, np.linalg.inv(bold.affine)
    sigma = SMOOTH_MM / nib.affines.voxel_sizes(affine)

    def smooth(frame: NDArray) -> NDArray[np.float64]:
        if not np.isfinite(frame).all():
            raise InputError(f"{bold.path} holds NaN or Inf, which a scanner does not write; repair or exclude the run")
        return ndimage.gaussian_filter(frame.reshape(bold.shape, order="F").astype(np.float64), sigma)

    middle = bold.frames // 2
    reference = smooth(next(frame for number, frame in enumerate(read()) if number == middle))
    if min(bold.shape) < 8:
        raise InputError(f"{bold.path} has {bold.shape} voxels, too few along an axis to find a head in; exclude it")
    slope, centre = _slope(reference, affine), _centre(bold)
    points = np.argwhere(_every_other(bold.shape))
    from_centre = nib.affines.apply_affine(affine, points) - centre
    at = tuple(points.T)
    still = reference[at]
    gradient = np.stack([part[at] for part in slope], axis=1)
    jacobian = np.hstack([gradient, np.cross(from_centre, gradient), still[:, None]])
    solve = np.linalg.pinv(jacobian)  # (7, V)
    turn, shift = np.eye(3), np.zeros(3)
    motion = np.empty((bold.frames, 4, 4))
    total = np.zeros(bold.shape)
    voxels = np.indices(bold.shape).reshape(3, -1).T
    for number, frame in enumerate(read()):
        moved = smooth(frame)
        for _ in range(MOST_STEPS):
            places = nib.affines.apply_affine(inverse, from_centre @ turn.T + shift + centre)
            seen = np.all((places >= 0) & (places <= np.array(bold.shape) - 1), axis=1)
            values = ndimage.map_coordinates(moved, places.T, order=1, mode="nearest")
            step = solve @ np.where(seen, values - still, 0)
            back = Rotation.from_rotvec(step[3:6]).as_matrix().T
            turn, shift = turn @ back, shift - turn @ back @ step[:3]
            if np.abs([*step[:3], *(50 * step[3:6])]).max() < CONVERGED_MM:
                break
        else:
            raise InputError(
                f"{bold.path}: frame {number} cannot be aligned with frame {middle}; the head moved too far, or the "
                "frame is damaged; exclude the run"
            )
        motion[number] = nib.affines.from_matvec(turn, centre + shift - turn @ centre)
        places = nib.affines.apply_affine(inverse @ motion[number] @ affine, voxels)
        image = frame.reshape(bold.shape, order="F").astype(np.float64)
        total += ndimage.map_coordinates(image, places.T, order=1, mode="nearest").reshape(bold.shape)
    scale = bold.image.dataobj
    return motion, total / bold.frames * scale.slope + scale.inter


def _slope(image: NDArray, affine: Matrix) -> NDArray[np.float64]:
    """Gradient in world coordinates, (3, X, Y, Z), per mm."""
    return np.tensordot(np.linalg.inv(affine[:3, :3]).T, np.stack(np.gradient(image)), 1)


def _every_other(shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    chosen = np.zeros(shape, bool)
    chosen[2:-2:2, 2:-2:2, 2:-2:2] = True
    return chosen


def _centre(bold: Bold) -> NDArray[np.float64]:
    """The middle of the field of view in world coordinates."""
    return nib.affines.apply_affine(bold.affine, (np.array(bold.shape) - 1) / 2)


def _confounds(motion: Matrix, bold: Bold) -> pd.DataFrame:
    centre = _centre(bold)
    table = pd.DataFrame(
        motion[:, :3, :3] @ centre + motion[:, :3, 3] - centre, columns=["trans_x", "trans_y", "trans_z"]
    )
    table[["rot_x", "rot_y", "rot_z"]] = Rotation.from_matrix(motion[:, :3, :3]).as_euler("xyz")
    table["framewise_displacement"] = framewise_displacement(table, bold.path)
    table.loc[0, "framewise_displacement"] = np.nan
    return table


@cache
def template() -> NDArray[np.float32]:
    """The MNI152 T1 template (nilearn's: 2009a, symmetric, skull off) on the grid, 0 outside; read-only."""
    image = load_mni152_template(resolution=2)
    inside = np.flatnonzero(grid.covered(image.affine, image.shape))
    flat = np.zeros(grid.SHAPE, np.float32).ravel()
    values = np.asarray(image.dataobj, np.float32).ravel()
    flat[inside] = grid.linear_operator(image.affine, image.shape, inside) @ values
    flat.setflags(write=False)
    return flat.reshape(grid.SHAPE)


def _to_template(bold: Bold, mean: NDArray[np.float64]) -> Matrix:
    """The affine transform from MNI world to the world of a run's mean (X, Y, Z), 0 outside the head.

    By SimpleITK: centres of mass, then rigid and then affine by mutual information (Mattes et al. 2001), from coarse to
    fine, on one thread, so that the same run always gives the same bits.
    """
    try:
        import SimpleITK as sitk  # noqa: N813
    except ImportError as error:
        raise InputError('--register needs SimpleITK; install it with pip install -e ".[register]"') from error

    fixed, moving = _itk(sitk, template(), grid.AFFINE), _itk(sitk, _clipped(mean), bold.affine)
    near = _itk(sitk, _near_brain().astype(np.uint8), grid.AFFINE)

    def search(start: Any, shrink: list[int]) -> Any:
        method = sitk.ImageRegistrationMethod()
        method.SetNumberOfThreads(1)
        method.SetMetricAsMattesMutualInformation(BINS)
        method.SetMetricFixedMask(near)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetShrinkFactorsPerLevel(shrink)
        method.SetSmoothingSigmasPerLevel([float(factor) for factor in shrink])
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        method.SetOptimizerAsGradientDescentLineSearch(1.0, 60, 1e-5, 8)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(start, inPlace=True)
        method.Execute(fixed, moving)
        return start

    try:
        moments = sitk.CenteredTransformInitializerFilter.MOMENTS
        start = sitk.CenteredTransformInitializer(fixed, moving, sitk.Euler3DTransform(), moments)
        rigid = search(sitk.Euler3DTransform(start), [4, 2])
        affine = sitk.AffineTransform(3)
        affine.SetCenter(rigid.GetCenter())
        affine.SetMatrix(rigid.GetMatrix())
        affine.SetTranslation(rigid.GetTranslation())
        affine = search(affine, [4, 2])
    except RuntimeError as error:  # what ITK raises
        why = one_line(error).rpartition(": ")[2]
        raise InputError(f"{bold.path} cannot be registered to the MNI template ({why}); use fMRIPrep") from error
    matrix, centre = np.reshape(affine.GetMatrix(), (3, 3)), np.array(affine.GetCenter())
    return nib.affines.from_matvec(matrix, centre + affine.GetTranslation() - matrix @ centre)


def _itk(sitk: Any, values: NDArray, affine: Matrix) -> Any:
    """An array (X, Y, Z) as an ITK image whose world is ours; ITK's order is (Z, Y, X)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T if values.dtype == np.uint8 else np.float32(values.T)))
    sizes = nib.affines.voxel_sizes(affine)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((affine[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def _clipped(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Less of vessels and of the brightness next to the coil."""
    return np.clip(mean, 0, np.percentile(mean[mean > 0], 99)) if (mean > 0).any() else mean


@cache
def _near_brain() -> NDArray[np.bool_]:
    return ndimage.binary_dilation(grid.mni_brain(), iterations=3)


def alignment(mean: NDArray[np.float64], affine: Matrix) -> dict[str, float]:
    """How well a mean EPI lies on the template, beside how well it would lie elsewhere.

    Args:
        mean: (X, Y, Z).
        affine: its voxels to MNI world, mm.

    Returns:
        "mutual_information", nats, near the template's brain, and "edge_alignment", 0 to 1, inside it: the squared
        cosine between the gradients of both images (normalised gradient fields: Haber and Modersitzki 2006, MICCAI),
        weighted by the template's. Neither asks that contrasts be the same. "information_margin" and "edge_margin" are
        these, divided by the best that the same image reaches when it is moved away: see `ELSEWHERE`.
    """
    found = _measures(mean, affine)
    moved = [_measures(mean, move @ affine) for move in ELSEWHERE.values()]
    best = np.max(moved, axis=0)
    values = [*found, *(found / np.maximum(best, 1e-9))]
    names = ("mutual_information", "edge_alignment", "information_margin", "edge_margin")
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _about_the_middle(matrix: NDArray) -> Matrix:
    """A linear map of MNI world that leaves the middle of the brain where it is."""
    middle = np.array([0.0, -18.0, 10.0])
    return nib.affines.from_matvec(matrix, middle - matrix @ middle)


def _elsewhere() -> dict[str, Matrix]:
    moves: dict[str, Matrix] = {}
    for axis, name in enumerate("xyz"):
        unit = np.eye(3)[axis]
        for sign in (-1, 1):
            moves[f"shifted {sign * 20:+d} mm along {name}"] = nib.affines.from_matvec(np.eye(3), sign * 20 * unit)
            turn = Rotation.from_rotvec(sign * np.deg2rad(30) * unit).as_matrix()
            moves[f"turned {sign * 30:+d} degrees about {name}"] = _about_the_middle(turn)
        moves[f"turned 180 degrees about {name}"] = _about_the_middle(2 * np.outer(unit, unit) - np.eye(3))
    for axis, name in ((1, "back to front"), (2, "upside down")):
        moves[f"mirrored, {name}"] = _about_the_middle(np.eye(3) - 2 * np.outer(np.eye(3)[axis], np.eye(3)[axis]))
    for factor in (0.8, 1.25):
        moves[f"scaled by {factor}"] = _about_the_middle(factor * np.eye(3))
    return moves


ELSEWHERE = _elsewhere()
"""Moves of MNI world that a right place must beat. Left and right are not exchanged: the template is symmetric to the
voxel, so that no measure of likeness to it can tell them apart."""


def _measures(mean: NDArray[np.float64], affine: Matrix) -> NDArray[np.float64]:
    """Mutual information and edge alignment at one place."""
    inside = grid.nearest(np.ones(mean.shape, bool), affine, COARSE_AFFINE, COARSE_SHAPE)
    target = _target()
    if np.count_nonzero(inside & target.brain) < 1000:
        return np.zeros(2)
    into = np.linalg.inv(affine) @ COARSE_AFFINE
    places = nib.affines.apply_affine(into, np.indices(COARSE_SHAPE).reshape(3, -1).T).T
    values = ndimage.map_coordinates(mean, places, order=1, mode="nearest").reshape(COARSE_SHAPE)
    return np.array([_information(values, inside & target.near), _edges(values, inside & target.brain)])


@dataclass(frozen=True)
class _Target:
    """The template on the coarse grid: values, their gradient (3, X, Y, Z), its brain, and a little more."""

    values: NDArray[np.float64]
    slope: NDArray[np.float64]
    brain: NDArray[np.bool_]
    near: NDArray[np.bool_]


@cache
def _target() -> _Target:
    every = (slice(None, None, COARSE),) * 3
    values = ndimage.gaussian_filter(template().astype(np.float64), 1)[every]
    return _Target(values, _smooth_slope(values), grid.mni_brain()[every], _near_brain()[every])


def _information(values: NDArray, inside: NDArray[np.bool_]) -> float:
    ours, theirs = (_within(image[inside]) for image in (values, _target().values))
    joint = np.histogram2d(ours, theirs, BINS)[0]
    joint /= joint.sum()
    apart = np.outer(joint.sum(1), joint.sum(0))
    some = joint > 0
    return float(np.sum(joint[some] * np.log(joint[some] / apart[some])))


def _within(values: NDArray) -> NDArray:
    """Without the extremes."""
    low, high = np.percentile(values, [1, 99])
    return np.clip(values, low, high)


def _edges(values: NDArray, inside: NDArray[np.bool_]) -> float:
    ours, theirs = _smooth_slope(values), _target().slope
    weight = np.linalg.norm(theirs, axis=0)
    cosines = np.sum(_directions(ours, inside) * _directions(theirs, inside), axis=0)[inside]
    return float(np.average(np.square(cosines), weights=weight[inside]))


def _smooth_slope(values: NDArray) -> NDArray[np.float64]:
    return np.stack(np.gradient(ndimage.gaussian_filter(values, EDGE_MM / (COARSE * grid.VOXEL_MM))))


def _directions(slope: NDArray, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Gradients of length near 1 where they stand out, and near 0 where there is little but noise."""
    length = np.linalg.norm(slope, axis=0)
    usual = float(np.mean(length[inside]))
    return slope / np.sqrt(np.square(length) + np.square(usual) + 1e-30)


def refuse_misaligned(found: dict[str, float], least: float, path: object) -> None:
    """Refuse a run that lies hardly better on the template than it would if it were moved away.

    Args:
        found: `alignment`.
        least: of both margins.
        path: named in the error.

    Raises:
        InputError: a margin is below.
    """
    for name, words in (("information_margin", "mutual information"), ("edge_margin", "alignment of edges")):
        if found[name] < least:
            raise InputError(
                f"{path}: its registration to the MNI template failed: {words} is only {found[name]:.2f} times what it "
                f"would be shifted, turned or mirrored ({least:g} is needed); look at the run, and use fMRIPrep"
            )
