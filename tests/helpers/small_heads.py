"""A made-up head in its own space: the MNI152 template, inverted as in EPI, with a bright marker on its left."""

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec
from nilearn.datasets import load_mni152_template
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from small_runs import save_bold

MARKER = (-42.0, -20.0, 30.0)  # in MNI, mm: the left hemisphere
SHAPE = (40, 44, 38)
VOXEL_MM = 5.0


def rigid(shift: tuple[float, float, float], degrees: tuple[float, float, float]) -> np.ndarray:
    """(4, 4): turned about the origin (about x, then y, then z), then shifted, mm."""
    return from_matvec(Rotation.from_euler("xyz", degrees, degrees=True).as_matrix(), shift)


PLACE = rigid((7, 22, -15), (-14, 4, 6)) @ np.diag([0.95, 1.04, 0.97, 1.0])
"""From MNI world to the scanner's: how the head lies."""


def orientation(codes: str, oblique: bool = False) -> np.ndarray:
    """The affine of an image that is stored by these axes, centred about the head."""
    matrix = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), SHAPE)[:3, :3] * VOXEL_MM
    if oblique:
        matrix = Rotation.from_euler("xyz", (17, -8, 5), degrees=True).as_matrix() @ matrix
    middle = apply_affine(PLACE, (0.0, -18.0, 8.0))
    return from_matvec(matrix, middle - matrix @ ((np.array(SHAPE) - 1) / 2))


def head(affine: np.ndarray, moved: np.ndarray | None = None) -> np.ndarray:
    """(X, Y, Z) of the head in the scanner, where it has moved (scanner's world to scanner's world)."""
    template = load_mni152_template(resolution=2)
    values = np.asarray(template.dataobj)
    scanner = apply_affine(affine, np.indices(SHAPE).reshape(3, -1).T)
    mni = apply_affine(np.linalg.inv(PLACE) @ np.linalg.inv(np.eye(4) if moved is None else moved), scanner)
    sampled = map_coordinates(values, apply_affine(np.linalg.inv(template.affine), mni).T, order=1)
    marker = np.exp(-np.sum(np.square(mni - MARKER), axis=1) / (2 * 6.0**2))
    return (1000 * np.where(sampled > 0.1, 1.3 - sampled, 0) + 600 * marker).reshape(SHAPE)


def save_head(path: Path, affine: np.ndarray, moves: list[np.ndarray], **header: int) -> Path:
    """Write a run whose head has moved by `moves`, one per frame; a little noise, TR 2 s."""
    noise = np.random.default_rng(0)
    frames = [head(affine, moved) + noise.normal(0, 5, SHAPE) for moved in moves]
    return save_bold(path, np.stack(frames, -1).astype(np.float32), affine, tr=2.0, **{"sform": 1, **header})
