"""The pattern inside labels: closed forms of its smoothness, and its balance.

Not covered: what label means show of it (test_synthetic.py).
"""

import math

import numpy as np
import pytest

from bundle.experiments.patterns import label_pattern, smooth_field


def test_the_field_is_smooth_and_fixed():
    """The correlation of smoothed white noise at a distance d is exp(-d² / 4 sigma²), with FWHM = 2.355 sigma."""
    field = smooth_field()
    r = np.corrcoef(field[:-4].ravel(), field[4:].ravel())[0, 1]  # 8 mm apart
    assert r == pytest.approx(math.exp(-(8**2) / (4 * (16 / 2.3548) ** 2)), abs=0.02)
    assert field.std() == pytest.approx(1)
    smooth_field.cache_clear()
    np.testing.assert_array_equal(smooth_field(), field)


def test_a_pattern_is_balanced_within_every_label():
    mm = np.random.default_rng(1).uniform(-60, 60, (500, 3))
    labels = np.random.default_rng(2).integers(0, 5, 500) * 2
    labels[0] = 11  # a label of one voxel
    mean = np.random.default_rng(3).uniform(0.5, 1.5, 500)
    pattern = label_pattern(mm, labels, mean).astype(float)
    for number in (2, 4, 6, 8):
        inside = labels == number
        assert np.sum(mean[inside] * pattern[inside]) == pytest.approx(0, abs=1e-5)
        assert np.mean(pattern[inside] ** 2) == pytest.approx(1, rel=1e-5)
    assert not pattern[labels == 0].any()
    assert pattern[0] == 0
