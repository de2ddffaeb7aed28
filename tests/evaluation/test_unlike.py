"""Distances against scikit-learn, left out by brute force, and how often subjects like the others are called far."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, norm
from sklearn.covariance import LedoitWolf
from sklearn.preprocessing import StandardScaler

from bundle.evaluation.unlike import FOLDS, exceedance, fit_distances, log_distances, log_distances_left_out

NO_FLOOR = 1e-12


def mixed(count: int, columns: int, seed: int) -> np.ndarray:
    """Correlated Gaussian rows of unequal scales."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(columns, columns)))[0]
    return 5 + rng.normal(size=(count, columns)) * np.exp(-np.arange(columns) / columns * 4) @ turn


def by_scikit_learn(train: np.ndarray, rows: np.ndarray) -> np.ndarray:
    scaler = StandardScaler().fit(train)
    return np.log1p(LedoitWolf().fit(scaler.transform(train)).mahalanobis(scaler.transform(rows)))


@pytest.mark.parametrize(("count", "columns"), [(12, 5), (12, 40), (40, 40), (200, 20)])
def test_distances_are_those_of_a_ledoit_wolf_covariance(count, columns):
    """Also where there are fewer rows than columns, so that most directions were never seen."""
    train, rows = mixed(count, columns, 0), 3 * mixed(9, columns, 1)
    found = log_distances(fit_distances(train, NO_FLOOR), rows)
    assert found == pytest.approx(by_scikit_learn(train, rows), rel=1e-9)


@pytest.mark.parametrize("count", [10, FOLDS + 13])
def test_a_row_is_left_out_of_what_it_is_compared_with(count):
    rows = mixed(count, 6, 2)
    found = log_distances_left_out(rows, NO_FLOOR)
    for number in range(count):
        others = np.arange(count) % FOLDS != number % FOLDS
        assert found[number] == pytest.approx(by_scikit_learn(rows[others], rows[number : number + 1])[0], rel=1e-9)
    assert (found > log_distances(fit_distances(rows, NO_FLOOR), rows)).mean() > 0.9  # their own ones are too small


@given(st.lists(st.floats(0, 20), min_size=2, max_size=30), st.floats(0, 30), st.floats(0, 30))
def test_what_is_larger_is_never_more_likely(others, one, two):
    low, high = sorted((one, two))
    values = np.array(others)
    assert 0 <= exceedance(high, values) <= exceedance(low, values) <= 1


def test_up_to_the_largest_it_is_counted_and_beyond_it_is_extrapolated():
    others = np.arange(1.0, 10.0)  # nine
    assert exceedance(0.0, others) == 1.0
    assert exceedance(8.5, others) == pytest.approx(2 / 10)
    assert exceedance(9.0, others) == pytest.approx(2 / 10)  # a tie counts
    beyond = [exceedance(value, others) for value in (9.1, 15.0, 30.0)]
    assert beyond[0] <= 1 / 10
    assert beyond == sorted(beyond, reverse=True)
    many = norm.ppf((np.arange(20000) + 0.5) / 20000)  # so many that Student's distribution is the normal one
    assert exceedance(5.0, many) == pytest.approx(norm.sf(5.0), rel=0.02)


def test_of_many_gaussian_rows_the_chance_is_that_of_chi_squared():
    train = mixed(5000, 4, 3)
    others = log_distances_left_out(train, NO_FLOOR)
    scale = np.linalg.inv(np.cov(train.T))
    for level in (0.5, 0.9, 0.99):
        row = train.mean(0) + np.linalg.cholesky(np.linalg.inv(scale))[:, 0] * np.sqrt(chi2.ppf(level, 4))
        value = log_distances(fit_distances(train, NO_FLOOR), row[None])[0]
        assert exceedance(value, others) == pytest.approx(1 - level, abs=4 * np.sqrt(level * (1 - level) / 5000))


@pytest.mark.parametrize(("count", "columns"), [(8, 4), (20, 15), (40, 100)])
def test_gaussian_subjects_of_the_same_kind_are_far_at_most_at_the_nominal_rate(count, columns):
    """Seeded; 40 trainings of 100 new subjects each. The rate's standard error is well below a third of it."""
    chances = []
    for seed in range(40):
        rows = mixed(count + 100, columns, 10 + seed)
        train, new = rows[:count], rows[count:]
        fitted, others = fit_distances(train, NO_FLOOR), log_distances_left_out(train, NO_FLOOR)
        chances += [exceedance(value, others) for value in log_distances(fitted, new)]
    for level in (0.2, 0.05, 0.01):
        assert np.mean(np.array(chances) <= level) <= 1.4 * level, level
    assert np.mean(np.array(chances) <= 0.2) >= 0.05  # and it is not that nobody is


def test_rounding_is_not_far_and_a_difference_is():
    """Where all subjects are the same, as of the coverage of a cohort with one mask."""
    rows = np.ones((10, 6))
    fitted, others = fit_distances(rows, 0.01), log_distances_left_out(rows, 0.01)
    near, far = log_distances(fitted, np.array([[1 + 1e-4] * 6, [1, 1, 1, 1, 1, 0.5]]))
    assert exceedance(near, others) == 1.0
    assert exceedance(far, others) < 1e-6
