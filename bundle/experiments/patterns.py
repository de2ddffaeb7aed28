"""A fixed spatial pattern inside the labels of an atlas, which no label's mean signal shows.

What is made of it is described in `bundle.experiments.synthetic`.
"""

from functools import cache

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from bundle.anatomy import grid

FWHM_MM = 16.0
SEED = 20251  # of the one field; the same for every subject, site and cohort


@cache
def smooth_field() -> np.ndarray:
    """White noise on the fixed 2 mm MNI grid, smoothed by a Gaussian of `FWHM_MM`: `grid.SHAPE`, SD 1; read-only."""
    noise = np.random.default_rng(SEED).standard_normal(grid.SHAPE)
    field = gaussian_filter(noise, FWHM_MM / np.sqrt(8 * np.log(2)) / grid.VOXEL_MM)
    field /= field.std()
    field.setflags(write=False)
    return field


def label_pattern(mm: np.ndarray, labels: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Sample the field at the voxels of a site, so that no label's average BOLD signal contains it.

    Within each label the sum of `mean * pattern` is 0, and the pattern's root mean square is 1.

    Args:
        mm: (v, 3) MNI coordinates of the voxels.
        labels: (v,) label numbers, 0 where there is none.
        mean: (v,) mean of each voxel, positive, in any unit.

    Returns:
        (v,) float32; 0 in voxels without a label, and in labels of a single voxel, which hold no pattern.
    """
    positions = nib.affines.apply_affine(np.linalg.inv(grid.AFFINE), mm)
    values = map_coordinates(smooth_field(), positions.T, order=1, mode="nearest")
    counts = np.maximum(np.bincount(labels), 1)
    centre = np.bincount(labels, mean * values) / np.maximum(np.bincount(labels, mean), np.finfo(float).tiny)
    values = np.where((labels > 0) & (counts[labels] > 1), values - centre[labels], 0)
    rms = np.sqrt(np.bincount(labels, values**2) / counts)
    return (values / np.where(rms > 0, rms, 1)[labels]).astype(np.float32)
