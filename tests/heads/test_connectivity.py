"""The mean of several models by their skill, against what it should be; the models themselves: test_baselines.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from bundle.heads.connectivity import shares_of


def model(skill: float, spread: float) -> SimpleNamespace:
    return SimpleNamespace(skill_=skill, spread_=spread)


@pytest.mark.parametrize(
    ("models", "usable", "expected"),
    [
        ([model(0.3, 2.0), model(0.1, 8.0)], [True, True], [0.75, 0.25]),
        ([model(0.3, 2.0), model(-0.2, 8.0)], [True, True], [1.0, 0.0]),
        ([model(0.3, 2.0), model(0.1, 8.0)], [False, True], [0.0, 1.0]),
        ([model(-0.1, 2.0), model(-0.2, 8.0)], [True, True], [0.5, 0.5]),
        ([model(-0.1, 2.0), model(-0.2, 8.0)], [False, True], [0.0, 1.0]),
        ([model(0.1, 2.0), model(0.3, 0.0)], [True, True], [0.25, 0.75]),  # one says the same of everybody
    ],
)
def test_the_mean_is_by_skill_whatever_the_scales_of_the_outputs_are(models, usable, expected):
    rng = np.random.default_rng(0)
    shares, scales = shares_of(models, usable)
    np.testing.assert_allclose(shares, expected)
    standard = rng.standard_normal((len(models), 1000))
    standard = (standard - standard.mean(1, keepdims=True)) / standard.std(1, keepdims=True)
    spreads = np.array([one.spread_ for one in models])
    outputs = spreads[:, None] * standard
    common = np.average(spreads, weights=expected)
    wanted = common * np.where(spreads > 0, expected, 0) @ standard
    np.testing.assert_allclose(scales @ outputs, wanted, atol=1e-12)
