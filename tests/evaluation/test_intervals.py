"""Expanded percentile intervals: against Student's t, the plain percentile interval, and simulated coverage."""

import numpy as np
import pytest
from scipy.stats import binom, bootstrap, norm, ttest_1samp
from tasks import binary_table

from bundle.evaluation.intervals import bootstrap_interval, clopper_pearson_lower, expanded_tail_share

RESAMPLES = 400


def mean(values, axis):
    return values.mean(axis)


def auroc(cases, controls, axis):
    return (cases[..., :, None] > controls[..., None, :]).mean((-2, -1))


def plain(samples, statistic, seed):
    found = bootstrap(samples, statistic, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed))
    return found.confidence_interval


@pytest.mark.parametrize("n", [8, 20, 60])
def test_interval_of_a_mean_is_students_and_the_plain_one_is_narrower(n):
    """The resampled mean of a symmetric sample is all but normal, so its limits can be told in advance."""
    half = norm.ppf(np.linspace(0.55, 0.95, n // 2))
    values = np.concatenate([half, -half])
    low, high = bootstrap_interval([values], mean, 20_000, 0)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx(tuple(expected), rel=0.08)
    narrow = plain([values], mean, 0)
    assert narrow.high - narrow.low < high - low


def test_for_many_subjects_it_is_the_plain_percentile_interval():
    assert expanded_tail_share(10_000) == pytest.approx(0.025, abs=1e-4)
    values = np.random.default_rng(0).exponential(size=2000)
    low, high = bootstrap_interval([values], mean, RESAMPLES, 3)
    expected = plain([values], mean, 3)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05 * (expected.high - expected.low))


@pytest.mark.parametrize(("truth", "n"), [(0.5, 8), (0.9, 8), (0.75, 20)])
def test_simulated_coverage(truth, n):
    """Binormal scores, n cases and n controls. The plain interval over 8 + 8 covers AUROC 0.9 with some 80 %.

    99.9 % of simulations at a coverage of 95 % lie within the bounds; a conservative interval may cover more.
    """
    rng, sets = np.random.default_rng([n, int(100 * truth)]), 200
    covered = narrow = 0
    for seed in range(sets):
        cases, controls = rng.normal(np.sqrt(2) * norm.ppf(truth), size=n), rng.normal(size=n)
        score = binary_table(np.repeat([1, 0], n), np.concatenate([cases, controls]), 0.0, RESAMPLES, seed)["auroc"]
        covered += score["low"] <= truth <= score["high"]
        interval = plain((cases, controls), auroc, seed)
        narrow += interval.low <= truth <= interval.high
    assert binom.ppf(0.0005, sets, 0.95) <= covered
    assert narrow < covered
    if (truth, n) == (0.9, 8):
        assert narrow < binom.ppf(0.0005, sets, 0.95)


def test_a_perfect_score_is_not_certain():
    """3 of 3 right by chance: 1 in 8, so that a rate of 0.5 cannot be excluded; the limit is where it is 1 in 40."""
    assert clopper_pearson_lower(3) ** 3 == pytest.approx(0.025)
    labels, logits = np.repeat([0, 1], [20, 3]), np.arange(23.0)
    for sign, value, known, other in ((1, 1, "high", "low"), (-1, 0, "low", "high")):
        table = binary_table(labels, sign * logits, sign * 19.5, RESAMPLES, 0)
        for name in ("auroc", "balanced_accuracy", "accuracy"):
            assert table[name]["value"] == table[name][known] == value
            assert abs(table[name][other] - value) == pytest.approx(1 - 0.025 ** (1 / 3))


def test_perfect_scores_cover_a_nearly_perfect_truth():
    """AUROC 0.98 with 8 + 8 subjects: half of the samples are perfect, and limits of 1 and 1 would miss it there."""
    rng, truth, perfect = np.random.default_rng(5), 0.98, 0
    for seed in range(50):
        cases, controls = rng.normal(np.sqrt(2) * norm.ppf(truth), size=8), rng.normal(size=8)
        if cases.min() > controls.max():
            perfect += 1
            score = binary_table(np.repeat([1, 0], 8), np.concatenate([cases, controls]), 0.0, 50, seed)["auroc"]
            assert score["low"] <= truth
    assert perfect > 10


def test_resamples_without_a_value_count_at_both_ends():
    def most_undefined(values, axis):
        return np.where(values.max(axis) < 2, np.nan, values.mean(axis))  # where neither of the two largest is drawn

    values = np.array([0.0, 1, 1, 1, 0, 1, 2, 2])
    low, high = bootstrap_interval([values], most_undefined, RESAMPLES, 0)
    assert np.isnan(low)
    assert np.isnan(high)  # 10 % of the resamples might be anything

    def few_undefined(values, axis):
        return np.where(values.max(axis) < 1, np.nan, values.mean(axis))  # (2 / 8)^8 of the resamples

    assert np.isfinite(bootstrap_interval([values], few_undefined, RESAMPLES, 0)).all()


def test_paired_samples_are_resampled_together():
    values = np.random.default_rng(0).normal(size=30)

    def difference(a, b, axis):
        return (a - b).mean(axis)

    assert bootstrap_interval([values, values + 1], difference, 100, 0, paired=True) == pytest.approx((-1, -1))
    low, high = bootstrap_interval([values, values + 1], difference, 100, 0)
    assert high - low > 0.5


def test_no_limits_from_one_subject():
    assert np.isnan(bootstrap_interval([np.array([1.0]), np.arange(5.0)], lambda a, b, axis: a.mean(axis), 10, 0)).all()
