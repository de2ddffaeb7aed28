"""Pooled scores and paired tests, against scikit-learn, scipy, brute force and the single-fold evaluation."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, norm, rankdata, t
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from tasks import BINARY, binary_table, subjects_of

from bundle.errors import InputError
from bundle.experiments.statistics import (
    Outcomes,
    compare,
    mean_p_value,
    outcomes,
    pooled_scores,
    rank_p_value,
)
from bundle.tasks.scores import measure
from bundle.tasks.task import Results


def given_by(labels, margins, folds=None) -> Outcomes:
    labels = np.asarray(labels, float)
    outputs = np.asarray(margins, float).reshape(len(labels), -1, 1)
    folds = np.zeros(len(labels)) if folds is None else folds
    tested = Results(labels, outputs, np.asarray(folds).astype(str), np.zeros(outputs.shape[:2]))
    names = [f"s{i:03d}" for i in range(len(labels))]
    return Outcomes(BINARY, names, np.full(len(labels), "A"), tested)


def noisy(n: int, effect: float, seed: int, seeds: int = 1) -> Outcomes:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    return given_by(labels, rng.normal(size=(n, seeds)) + effect * labels[:, None] - effect / 2, np.arange(n) // 2 % 3)


def test_one_fold_and_seed_gives_the_table_of_the_single_evaluation():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [30, 20])
    logits = rng.normal(size=50) + labels
    expected = binary_table(labels, logits, threshold=0.3, resamples=200, seed=5)
    found = pooled_scores(given_by(labels, logits - 0.3), resamples=200, seed=5)
    for metric, score in found.items():
        if metric == "brier":  # of the logit itself, which no threshold moves
            continue
        for key in ("value", "low", "high"):
            assert score[key] == pytest.approx(expected[metric][key]), (metric, key)
        assert np.isnan(score["seed_sd"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_auroc_is_that_of_scikit_learn_in_each_fold_weighted_by_pairs(seed):
    """Folds on different scales (+100) must not change it: one pooled AUROC would."""
    rng = np.random.default_rng(seed)
    labels, folds = rng.integers(0, 2, 40), rng.integers(0, 3, 40)
    margins = rng.integers(-4, 5, size=(40, 2)) + 100.0 * folds[:, None]
    total = weight = 0.0
    for fold in range(3):
        inside = folds == fold
        pairs = (labels[inside] == 1).sum() * (labels[inside] == 0).sum()
        if pairs:
            weight += pairs
            total += pairs * np.mean([roc_auc_score(labels[inside], m) for m in margins[inside].T])
    if weight:
        assert measure(BINARY, given_by(labels, margins, folds).tested)["auroc"] == pytest.approx(total / weight)


def test_intervals_are_those_of_a_slow_bootstrap_with_scikit_learn():
    """Three folds on different scales and two seeds; the same resamples, scored one at a time."""
    rng, n, resamples = np.random.default_rng(8), 60, 200
    labels, folds = np.arange(n) % 2, np.arange(n) // 2 % 3
    margins = rng.normal(size=(n, 2)) + labels[:, None] + 100 * (folds[:, None] - 1)
    tested = given_by(labels, margins, folds)

    def slow(cases, controls):
        """AUROC, balanced accuracy and accuracy of subjects, the mean over seeds."""
        drawn = np.concatenate([cases, controls])
        scores = np.zeros(3)
        for margin in margins.T:
            parts = [drawn[folds[drawn] == fold] for fold in range(3)]
            pairs = [labels[part].sum() * (1 - labels[part]).sum() for part in parts]
            within = [roc_auc_score(labels[part], margin[part]) for part in parts]
            scores[0] += np.average(within, weights=pairs)
            scores[1] += balanced_accuracy_score(labels[drawn], margin[drawn] > 0)
            scores[2] += accuracy_score(labels[drawn], margin[drawn] > 0)
        return scores / 2

    groups = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    settings = {"n_resamples": resamples, "batch": 100, "method": "percentile", "rng": np.random.default_rng(0)}
    draws = bootstrap(groups, slow, vectorized=False, **settings).bootstrap_distribution
    share = norm.cdf(-np.sqrt(30 / 29) * t.ppf(0.975, 29))  # 30 cases, 30 controls
    low = np.quantile(draws, share, axis=1, method="lower")
    high = np.quantile(draws, 1 - share, axis=1, method="higher")
    scores = pooled_scores(tested, resamples)
    for position, metric in enumerate(("auroc", "balanced_accuracy", "accuracy")):
        score = scores[metric]
        found = score["low"], score["value"], score["high"]
        assert found == pytest.approx((low[position], slow(*groups)[position], high[position])), metric


def test_auroc_permutation_is_the_exact_one_by_brute_force():
    """8 subjects: all 2^8 swaps of ranks are tried, here with scikit-learn's AUROC."""
    rng = np.random.default_rng(3)
    labels = np.array([0, 1] * 4)
    first, second = rng.normal(size=8) + 2 * labels, rng.normal(size=8)
    ranks = np.stack([rankdata(first), rankdata(second)])
    observed = roc_auc_score(labels, ranks[0]) - roc_auc_score(labels, ranks[1])
    null = []
    for swap in itertools.product((0, 1), repeat=8):
        a = np.where(swap, ranks[1], ranks[0])
        b = np.where(swap, ranks[0], ranks[1])
        null.append(roc_auc_score(labels, a) - roc_auc_score(labels, b))
    above, below = np.mean(np.array(null) >= observed - 1e-9), np.mean(np.array(null) <= observed + 1e-9)
    p = rank_p_value(given_by(labels, first), given_by(labels, second), resamples=1000)
    assert p == pytest.approx(min(1, 2 * min(above, below)))


def test_p_values_are_honest_without_a_difference_and_small_with_one():
    p = [rank_p_value(noisy(40, 1, seed), noisy(40, 1, 1000 + seed), resamples=99) for seed in range(60)]
    assert np.mean(np.array(p) < 0.05) <= 0.13  # 3 binomial SD above 5 %
    assert rank_p_value(noisy(100, 3, 1), noisy(100, 0, 2), resamples=199) <= 0.01
    assert mean_p_value(noisy(100, 3, 1, seeds=2), noisy(100, 0, 2, seeds=2), "accuracy", resamples=199) <= 0.01


def test_mcnemar_is_the_binomial_test_of_discordant_subjects():
    first, second = noisy(60, 2, 1), noisy(60, 0, 2)
    right = [(own.tested.outputs[:, 0, 0] > 0) == (own.tested.labels == 1) for own in (first, second)]
    better, worse = int(np.sum(right[0] & ~right[1])), int(np.sum(~right[0] & right[1]))
    assert mean_p_value(first, second, "accuracy") == pytest.approx(binomtest(better, better + worse).pvalue)


@pytest.mark.parametrize(
    ("first", "second"),
    [([3, 3, 0, 2, 0, 0, 1, 3], [2, 1, 0, 3, 2, 2, 2, 0]), ([0, 1, 2, 3, 3, 1, 2, 0], [1, 3, 2, 3, 2, 2, 3, 2])],
)
def test_accuracies_of_several_seeds_are_compared_by_all_exchanges_with_ties(first, second):
    """All 2^8 exchanges, counted in whole thirds, so that equal differences are equal."""
    labels = np.repeat([0, 1], 4)
    tested = []
    for thirds in (first, second):
        right = np.arange(3) < np.array(thirds)[:, None]  # (subjects, seeds)
        tested.append(given_by(labels, np.where(right == (labels[:, None] == 1), 1, -1)))
    gains = np.array(first) - second
    null = np.array([np.sum(np.where(swap, -1, 1) * gains) for swap in itertools.product((0, 1), repeat=8)])
    expected = min(1, 2 * min(np.mean(null <= gains.sum()), np.mean(null >= gains.sum())))
    assert mean_p_value(*tested, "accuracy", resamples=1000) == pytest.approx(expected)


def test_comparison_is_corrected_for_the_number_of_strategies():
    table = compare(
        {"random_tube": noisy(60, 0, 0), "a": noisy(60, 1, 1), "b": noisy(60, 2, 2), "c": noisy(60, 0, 3)},
        resamples=199,
    ).set_index("strategy")
    assert table.loc["random_tube", ["auroc_p", "accuracy_p"]].isna().all()
    for metric in ("auroc", "accuracy"):
        p = table[f"{metric}_p"].drop("random_tube").sort_values()
        holm = np.minimum(1, np.maximum.accumulate(p.to_numpy() * [3, 2, 1]))  # Holm 1979
        assert table.loc[p.index, f"{metric}_p_holm"].to_numpy() == pytest.approx(holm)
        assert table.loc["b", f"{metric}_difference"] == pytest.approx(
            table.loc["b", metric] - table.loc["random_tube", metric]
        )


def test_a_control_with_shuffled_labels_is_not_compared_with_true_ones():
    control = noisy(60, 0, 1)
    shuffled = given_by(1 - control.tested.labels, control.tested.outputs, control.folds)
    table = compare({"random_tube": noisy(60, 0, 0), "a": noisy(60, 1, 1), "control": shuffled}, resamples=99)
    table = table.set_index("strategy")
    assert np.isfinite(table.loc["control", "auroc"])
    assert table.loc["control", ["auroc_difference", "auroc_p", "accuracy_p", "auroc_p_holm"]].isna().all()
    assert table.loc["a", "auroc_p_holm"] == pytest.approx(table.loc["a", "auroc_p"])  # one comparison only


def test_seeds_are_averaged_and_never_counted_as_subjects():
    """Three identical seeds: the same interval as one, not a narrower one."""
    one = noisy(60, 1, 4)
    three = given_by(one.tested.labels, np.repeat(one.tested.outputs, 3, axis=1), one.folds)
    for metric, score in pooled_scores(three, resamples=200).items():
        expected = pooled_scores(one, resamples=200)[metric]
        assert (score["low"], score["value"], score["high"]) == pytest.approx(
            (expected["low"], expected["value"], expected["high"])
        )
        assert score["seed_sd"] == pytest.approx(0)


def rows(seed: int, participants: range) -> pd.DataFrame:
    table = subjects_of([i % 2 for i in participants], list(participants), [f"s{i}" for i in participants])
    return table.assign(fold="0", seed=seed, threshold=0.0)


def test_a_seed_with_unfinished_folds_is_left_out():
    found = outcomes(pd.concat([rows(0, range(6)), rows(1, range(4))]), BINARY)
    assert found.tested.outputs.shape == (6, 1, 1)
    with pytest.raises(InputError, match="finish the sweep"):
        outcomes(pd.concat([rows(0, range(4)), rows(1, range(2, 6))]), BINARY)
