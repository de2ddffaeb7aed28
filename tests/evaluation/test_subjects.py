"""The final test: threshold from validation only, intervals over subjects."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from tasks import BINARY, binary_table, subjects_of

from bundle.errors import InputError
from bundle.evaluation.subjects import evaluate, write_test_scores
from bundle.tasks.binary import youden_threshold
from bundle.training.checkpoints import weights_sha256


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-20, 20)), min_size=2, max_size=30))
def test_no_threshold_beats_youden(pairs):
    labels = np.array([label for label, _ in pairs], dtype=int)
    if len(np.unique(labels)) < 2:
        return
    logits = np.array([value / 4 for _, value in pairs])
    chosen = youden_threshold(labels, logits)
    everywhere = [balanced_accuracy_score(labels, logits > cut) for cut in np.arange(-5.125, 5.25, 0.25)]  # all cuts
    assert balanced_accuracy_score(labels, logits > chosen) == pytest.approx(max(everywhere))


def test_scores_are_those_of_scikit_learn_and_intervals_hold_them():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [40, 25])
    logits = rng.normal(size=65) + labels
    table = binary_table(labels, logits, threshold=0.5, resamples=300, seed=0)
    assert table["auroc"]["value"] == pytest.approx(roc_auc_score(labels, logits))
    assert table["accuracy"]["value"] == pytest.approx(np.mean((logits > 0.5) == labels))
    assert table["majority_accuracy"]["value"] == pytest.approx(40 / 65)
    for score in table.values():
        assert score["low"] <= score["value"] <= score["high"]


def test_a_single_case_has_a_score_and_no_interval():
    """As where a small site is left out."""
    table = binary_table(np.array([0, 0, 1]), np.array([-1.0, 2.0, 1.0]), threshold=0.0, resamples=50, seed=0)
    assert table["auroc"]["value"] == 0.5
    assert np.isnan(table["auroc"]["low"])
    assert np.isnan(table["auroc"]["high"])


def test_a_validation_set_of_one_class_gives_no_threshold():
    with pytest.raises(InputError, match="only the first class"):
        youden_threshold(np.zeros(4, int), np.arange(4.0))


def test_a_site_of_one_class_has_an_accuracy_and_nothing_else(tmp_path):
    """Nothing is refused and nothing lost: its subjects are written, and count where folds are pooled."""
    validation, test = subjects_of([0, 1], [-1, 1]), subjects_of([0, 0, 0], [-3, -2, 5])
    table = write_test_scores(BINARY, validation, test, tmp_path, resamples=20)
    assert table["accuracy"]["value"] == pytest.approx(2 / 3)
    assert np.isnan([table["auroc"]["value"], table["balanced_accuracy"]["value"], table["accuracy"]["low"]]).all()
    assert len(pd.read_csv(tmp_path / "subjects.tsv", sep="\t")) == 3

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    written = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)["scores"]
    assert written["auroc"] == {"value": None, "low": None, "high": None}
    assert written["accuracy"]["value"] == pytest.approx(2 / 3)


def test_interval_of_auroc_has_the_textbook_width():
    """Hanley & McNeil (1982) standard error of the AUROC, within 25 %."""
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], [60, 60])
    logits = rng.normal(size=120) + 0.9 * labels
    table = binary_table(labels, logits, threshold=0.0, resamples=1000, seed=0)["auroc"]
    a = table["value"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 59 * (q1 - a * a) + 59 * (q2 - a * a)) / 3600)
    assert (table["high"] - table["low"]) == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_threshold_comes_from_validation_and_files_are_written(store, tmp_path):
    """The test set alone would put the threshold elsewhere; it must not."""
    validation = SimpleNamespace(task=BINARY, subjects=subjects_of([0, 0, 1, 1], [-3, -2, 1, 2]))
    found = subjects_of([0, 0, 1, 1], [-9, -8, -7, 5], ["sub-00", "sub-01", "sub-02", "sub-03"]).drop(columns="site")
    test = SimpleNamespace(task=BINARY, subjects=found)
    order: list[str] = []
    network = torch.nn.Linear(2, 1)
    table = evaluate(
        SimpleNamespace(run=lambda: order.append("validation")),
        SimpleNamespace(run=lambda: order.append("test"), network=network),
        validation,
        test,
        store,
        tmp_path,
        resamples=100,
    )
    assert order == ["validation", "test"]
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["threshold"] == -0.5
    assert summary["weights_sha256"] == weights_sha256(network.state_dict())
    assert table["accuracy"]["value"] == 0.75
    written = pd.read_csv(tmp_path / "subjects.tsv", sep="\t")
    assert written["predicted"].tolist() == [0, 0, 0, 1]
    assert written["probability"].tolist() == pytest.approx((1 / (1 + np.exp([9, 8, 7, -5]))).tolist())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.json", "scores.png", "subjects.tsv"]
