"""The truth test in small: few labels, one cohort with a strong effect and one without; see `scripts truth`."""

import pandas as pd
import pytest
from small_stores import planted_store

from bundle.errors import InputError
from bundle.sweep import Sweep
from bundle.truth import summarise, truth_test


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

    monkeypatch.setattr("bundle.cells.run_bundle", broken)
    sweep = Sweep("", "", {"folds": 3, "test": [0]}, strategies=["random_weights"], steps=[])
    with pytest.raises(InputError, match=r"^2 cells failed; run again to go on\. ") as error:
        truth_test(tmp_path, sweep, ("nothing", "coupling"), 4.0, (0,), 24, cohort=cohort)
    for name in ("nothing_seed-0", "coupling_seed-0"):
        assert f"{name}: random_weights__seed-0__fold-0: broken on purpose" in str(error.value)
    assert not (tmp_path / "truth.csv").exists()


def test_shares_count_cohorts():
    rows = [("nothing", 0.4, 0.6), ("nothing", 0.55, 0.7), ("coupling", 0.6, 0.9), ("coupling", 0.7, 0.9)]
    table = pd.DataFrame(rows, columns=["planted", "low", "high"]).assign(strategy="a", value=0.5, seed=range(4))
    found = summarise(table).set_index("planted")
    assert found["share_above_chance"].tolist() == pytest.approx([0.5, 1.0])
    assert found["share_covering_chance"].tolist() == pytest.approx([0.5, 0.0])
