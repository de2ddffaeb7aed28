"""The truth test in small: few labels, one cohort with a strong effect and one without; see `scripts truth`."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeClassifier
from small_stores import planted_store
from tasks import BINARY, subjects_of

from bundle.data.splits import make_splits
from bundle.errors import InputError
from bundle.experiments.statistics import outcomes
from bundle.experiments.sweep import Sweep
from bundle.experiments.truth import summarise, truth_test
from bundle.tasks.scores import measure


def cohort(folder, subjects, planted, effect, seed):
    """28 labels, 3 limbic and 5 cerebellar: 25 of 25 simulated cohorts beat chance (with 14 labels 11 of 25 do)."""
    return planted_store(folder, subjects, effect if planted == "coupling" else 0.0, seed, every=6)


def test_planted_effect_is_found_over_all_subjects(tmp_path):
    sweep = Sweep("", "", {"folds": 3}, baselines=["connectivity_logistic"], bootstrap_resamples=20)
    table = truth_test(tmp_path, sweep, ("nothing", "coupling"), 4.0, (200,), 48, resamples=200, cohort=cohort)
    assert table["planted"].tolist() == ["nothing", "coupling"]
    assert table.loc[1, "low"] > 0.5
    assert table.loc[1, "value"] > table.loc[0, "value"]
    assert (tmp_path / "truth.csv").is_file()


def test_all_failures_are_named_and_stop_no_other_cohort(tmp_path, monkeypatch):
    def broken(run_id, configs, overrides, *rest):
        raise InputError("broken on purpose")

    monkeypatch.setattr("bundle.experiments.trial.run_config", broken)
    sweep = Sweep("", "", {"folds": 3, "test": [0]}, strategies=["random_weights"], steps=[])
    with pytest.raises(InputError, match=r"^2 trials failed; run again to go on\. ") as error:
        truth_test(tmp_path, sweep, ("nothing", "coupling"), 4.0, (0,), 24, cohort=cohort)
    for name in ("nothing_seed-0", "coupling_seed-0"):
        assert f"{name}: random_weights__seed-0__fold-0: broken on purpose" in str(error.value)
    assert not (tmp_path / "truth.csv").exists()


def test_cross_validation_without_an_effect_scores_one_half_on_average():
    """300 cohorts of 48 subjects of three sites that differ far more than subjects do, split and pooled as in a sweep.

    Folds dealt regardless of site and diagnosis fail this: a training set with more cases of a site leaves a test set
    with fewer, and site is what features show most. The bound is 3 standard errors of the mean, from the SD of the
    AUROC of 8 cases and 8 controls in each of three independent folds (Mann and Whitney 1947): the root of
    17 / (12 * 64) / 3 is 0.086.
    """
    found = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        sites, labels = np.arange(48) % 3, np.zeros(48, int)
        for site in range(3):
            labels[sites == site] = rng.permutation(np.arange(16) % 2)
        features = rng.normal(size=(48, 6)) + 5 * rng.normal(size=(3, 6))[sites]
        runs = [
            {"participant_id": f"{i:02d}", "site": str(site), "diagnosis": int(label)}
            for i, (site, label) in enumerate(zip(sites, labels, strict=True))
        ]
        parts = []
        for fold in range(3):
            sets = make_splits(runs, folds=3, fold=fold)["sets"]
            train, test = (np.array([int(name) for name in sets[subset]]) for subset in ("train", "test"))
            model = RidgeClassifier().fit(features[train], labels[train])
            scored = subjects_of(labels[test], model.decision_function(features[test]), sets["test"])
            parts.append(scored.assign(fold=str(fold), seed=0, threshold=0.0))
        found.append(measure(BINARY, outcomes(pd.concat(parts), BINARY).tested)["auroc"])
    assert np.mean(found) == pytest.approx(0.5, abs=3 * 0.086 / np.sqrt(300))


def test_shares_count_cohorts():
    rows = [("nothing", 0.4, 0.6), ("nothing", 0.55, 0.7), ("coupling", 0.6, 0.9), ("coupling", 0.7, 0.9)]
    table = pd.DataFrame(rows, columns=["planted", "low", "high"]).assign(strategy="a", value=0.5, seed=range(4))
    found = summarise(table).set_index("planted")
    assert found["share_above_chance"].tolist() == pytest.approx([0.5, 1.0])
    assert found["share_covering_chance"].tolist() == pytest.approx([0.5, 0.0])
