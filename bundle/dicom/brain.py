"""Whether an EPI shows a head or a phantom: a phantom is smooth inside, a brain has grey and white matter and CSF.

A weak check, on purpose: it stops the water bottles and spheres of quality assurance. A phantom with structures inside
passes it, and so does any other part of the body.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

DEPTH_MM = 15.0  # inside the edge, where a phantom is smooth too
SMOOTH_MM = 9.0  # SD of the Gaussian that takes the coil's shading for what is smooth
LEAST_DETAIL = 0.055  # heads have 0.07 to 0.16, the water phantom that was measured 0.036


def detail(mean: NDArray[np.floating], pixel_mm: tuple[float, float]) -> float:
    """How far the inside of an object departs from its smoothed self, as a share of it.

    Args:
        mean: (X, Y, Z) mean over time, any unit.
        pixel_mm: size of X and Y.

    Returns:
        The robust SD (from the median absolute deviation) of mean / smoothed mean over all voxels deep inside; 0 where
        there are none.
    """
    bright = mean > _threshold(mean)
    found = []
    for image, inside in zip(np.moveaxis(mean, 2, 0), np.moveaxis(bright, 2, 0), strict=True):  # (X, Y) each
        inside = ndimage.binary_fill_holes(inside)
        depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=pixel_mm)[1:-1, 1:-1]
        sigma = SMOOTH_MM / np.array(pixel_mm)
        weight = ndimage.gaussian_filter(inside.astype(float), sigma)
        smooth = ndimage.gaussian_filter(np.where(inside, image, 0.0), sigma)
        deep = (depth > DEPTH_MM) & (smooth > 0)
        found.append(image[deep] * weight[deep] / smooth[deep])
    ratios = np.concatenate(found)
    return 1.4826 * float(np.median(np.abs(ratios - np.median(ratios)))) if len(ratios) else 0.0


def _threshold(mean: NDArray[np.floating]) -> float:
    """Otsu's: the value that best parts the object from the air."""
    counts, edges = np.histogram(mean[mean > 0], 256)
    centres, below, total = (
        (edges[1:] + edges[:-1]) / 2,
        np.cumsum(counts),
        np.cumsum(counts * (edges[1:] + edges[:-1]) / 2),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (total[-1] * below / below[-1] - total) ** 2 / (below * (below[-1] - below))
    return float(centres[np.argmax(np.nan_to_num(between, posinf=0.0))])
