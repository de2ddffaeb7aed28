"""How far a subject is from others: shrunk Mahalanobis distance, and how rare such a distance is."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Floats = NDArray[np.float64]
Fitted = dict[str, Floats]

FOLDS = 50
"""Rows are left out one by one, or where there are more of them in so many groups."""
LEAST_SPREAD = 0.05
"""Of logarithms: differences of a few percent are never far, however alike the others are."""
TIE = 1e-3
"""Of logarithms: what differs by rounding, as on another machine, is the same."""


def fit_distances(rows: Floats, floor: float) -> Fitted:
    """Mean and shrunk covariance of standardised rows.

    The covariance is Ledoit and Wolf's (2004, J Multivariate Anal 88:365; scikit-learn's `LedoitWolf`), in the
    directions that the rows span, so that it costs no memory for many columns and few rows.

    Args:
        rows: (n, d), of at least two subjects.
        floor: a difference in a column that means nothing, such as rounding, in its unit: it counts as further SD.

    Returns:
        "mean" and "scale" (d,); "directions" (r, d) and the variances in them, "inside" (r,), and in all others,
        "outside" (). Values of standardised rows.
    """
    count, columns = rows.shape
    mean = rows.mean(0)
    scale = np.hypot(rows.std(0), floor)
    x = (rows - mean) / scale
    _, lengths, directions = np.linalg.svd(x, full_matrices=False)
    variances = lengths**2 / count
    average = variances.sum() / columns
    delta = np.square(variances).sum() / columns - average**2
    beta = (np.square(np.square(x).sum(1)).sum() / count - np.square(variances).sum()) / (count * columns)
    shrinkage = min(beta / delta, 1.0) if delta > 0 else 1.0
    outside = shrinkage * average + np.mean((floor / scale) ** 2)
    inside = (1 - shrinkage) * variances + outside
    return {"mean": mean, "scale": scale, "directions": directions, "inside": inside, "outside": np.asarray(outside)}


def log_distances(fitted: Mapping[str, Floats], rows: Floats) -> Floats:
    """Logarithm of 1 + the squared Mahalanobis distance of rows (m, d): (m,)."""
    x = (rows - fitted["mean"]) / fitted["scale"]
    along = np.square(x @ fitted["directions"].T)  # (m, r)
    beside = np.maximum(np.square(x).sum(1) - along.sum(1), 0)
    return np.log1p((along / fitted["inside"]).sum(1) + beside / fitted["outside"])


def log_distances_left_out(rows: Floats, floor: float) -> Floats:
    """`log_distances` of each row (n, d) from the others, (n,): a row is near to a mean that it has helped to make.

    Of more than `FOLDS` rows, every `FOLDS`-th is left out together with it, which makes all a little farther.
    """
    fold = np.arange(len(rows)) % FOLDS
    found = np.empty(len(rows))
    for number in np.unique(fold):
        out = fold == number
        found[out] = log_distances(fit_distances(rows[~out], floor), rows[out])
    return found


def exceedance(value: float, others: Floats) -> float:
    """Probability that another subject like the others has at least this value, 0 to 1.

    Up to the largest of n others it is counted, (1 + those that are as large) / (n + 1), which holds whatever the
    distribution. Beyond, nothing can be counted: it is Student's predictive distribution with n - 1 degrees of freedom
    (values taken as normal), and never more than 1 / (n + 1).

    Args:
        value: logarithm of a distance or a measure.
        others: those of n subjects, at least two.
    """
    count = len(others)
    above = int((others >= value - TIE).sum())
    if above:
        return (1 + above) / (count + 1)
    spread = max(float(others.std(ddof=1)), LEAST_SPREAD) * np.sqrt(1 + 1 / count)
    return min(float(student.sf((value - others.mean()) / spread, count - 1)), 1 / (count + 1))
