"""AUROC over cohorts and folds, and differences of it, against scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from bundle.experiments.auroc import differences, summarise


def made_up(cohort: str, seeds: int, subjects: int, shift: float, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(seeds):
        for person in range(subjects):
            label = person % 2
            row = {"cohort": cohort, "encoder": "e", "readout": "r", "size": 0, "shuffled": False, "shifted": False}
            fold = person // 2 % 3
            logit = shift * label + rng.normal() + 10 * fold  # folds are on scales of their own
            rows.append(
                row | {"seed": number, "fold": fold, "participant_id": f"{person}", "label": label, "logit": logit}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("cohort", ["coupling", "painted"])
def test_the_auroc_is_scikit_learns_within_each_seed_and_fold(cohort):
    rows = made_up(cohort, seeds=3, subjects=30, shift=1.0)
    [found] = summarise(rows, resamples=200).to_dict("records")
    parts = [part for _, part in rows.groupby(["seed", "fold"])]
    expected = [roc_auc_score(part["label"], part["logit"]) for part in parts]  # all folds are of one size
    assert found["seeds"] == 3
    if cohort == "coupling":
        assert found["auroc"] == pytest.approx(np.mean(expected))
    else:  # a subject's mean over the seeds
        assert found["auroc"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert found["low"] < found["auroc"] < found["high"]


def test_seeds_of_the_painted_cohort_are_the_same_subjects_and_do_not_narrow_its_interval():
    one = made_up("painted", seeds=1, subjects=40, shift=0.8)
    copies = pd.concat([one.assign(seed=seed) for seed in range(5)])
    width = {
        name: tuple(summarise(rows, 400).loc[0, ["low", "high"]])
        for name, rows in {"one": one, "five": copies, "others": copies.assign(cohort="coupling")}.items()
    }
    assert width["five"] == pytest.approx(width["one"])
    low, high = width["others"]
    assert high - low < 0.7 * (width["one"][1] - width["one"][0])


def test_a_difference_is_of_the_same_subjects():
    good, bad = made_up("coupling", 2, 40, 2.0), made_up("coupling", 2, 40, 0.0).assign(encoder="other")
    rows = pd.concat([good, bad])
    what = {"cohort": "coupling", "readout": "r"}
    pairs = [({**what, "encoder": "e"}, {**what, "encoder": other}) for other in ("other", "e")]
    found = differences(rows, pairs, resamples=200)
    both = summarise(rows, 50).set_index("encoder")["auroc"]
    assert found["difference"].tolist() == [pytest.approx(both["e"] - both["other"]), 0.0]
    assert found.loc[0, "low"] > 0
    assert (found.loc[1, "low"], found.loc[1, "high"]) == (0, 0)
    assert found.loc[0, ["first", "second"]].tolist() == ["e: r", "other: r"]
