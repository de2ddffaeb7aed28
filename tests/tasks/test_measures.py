"""Measures of every task, against scikit-learn and scipy, for everybody once and for subjects drawn several times."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import pearsonr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from sklearn.preprocessing import StandardScaler

from bundle.data.splits import save_splits, splits_of
from bundle.data.targets import Target
from bundle.errors import InputError
from bundle.tasks.binary import Binary
from bundle.tasks.kinds import task_from, task_of
from bundle.tasks.multiclass import Multiclass
from bundle.tasks.regression import Regression
from bundle.tasks.scores import measure
from bundle.tasks.task import Results, Task

CLASSES = ("a", "b", "c")
TASKS = {
    "binary": Binary("group", ("a", "b")),
    "multiclass": Multiclass("group", CLASSES),
    "regression": Regression("age", mean=12.0, sd=3.0),
}


def results(kind: str, n: int, seed: int, seeds: int = 2, ties: bool = True) -> Results:
    """Scores that know a little, many of them equal, in one group."""
    rng = np.random.default_rng(seed)
    if kind == "regression":
        labels = rng.normal(12, 3, n)
        outputs = labels[:, None, None] + rng.normal(0, 3, (n, seeds, 1))
    else:
        count = len(TASKS[kind].classes)
        labels = (np.arange(n) % count).astype(float)
        size = 1 if kind == "binary" else count
        outputs = rng.integers(-3, 4, (n, seeds, size)).astype(float) if ties else rng.normal(size=(n, seeds, size))
        outputs[np.arange(n), :, (labels.astype(int) if size > 1 else 0)] += 1
    return Results(labels, outputs, np.full(n, ""), np.full((n, seeds), 0.5 if kind == "binary" else 0.0))


def expected(kind: str, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """What scikit-learn and scipy make of one seed."""
    if kind == "binary":
        logits = outputs[:, 0]
        return {
            "auroc": roc_auc_score(labels, logits),
            "auprc": average_precision_score(labels, logits),
            "balanced_accuracy": balanced_accuracy_score(labels, logits > 0.5),
            "accuracy": accuracy_score(labels, logits > 0.5),
            "brier": brier_score_loss(labels, expit(logits)),
        }
    if kind == "multiclass":
        called = outputs.argmax(1)
        return {
            "macro_auroc": roc_auc_score(labels, softmax(outputs, axis=1), multi_class="ovr"),
            "balanced_accuracy": balanced_accuracy_score(labels, called),
            "macro_f1": f1_score(labels, called, average="macro"),
            "accuracy": accuracy_score(labels, called),
        }
    predicted = outputs[:, 0]
    return {
        "r2": r2_score(labels, predicted),
        "pearson_r": pearsonr(labels, predicted).statistic,
        "mae": mean_absolute_error(labels, predicted),
    }


@pytest.mark.parametrize("kind", TASKS)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(12, 40), seed=st.integers(0, 10_000))
def test_measures_are_those_of_scikit_learn_averaged_over_seeds(kind, n, seed):
    tested = results(kind, n, seed)
    single = [expected(kind, tested.labels, tested.outputs[:, s]) for s in (0, 1)]
    found = measure(TASKS[kind], tested)
    assert found == pytest.approx({name: np.mean([one[name] for one in single]) for name in found})


@pytest.mark.parametrize("kind", TASKS)
def test_counts_are_repeated_subjects(kind):
    """A subject that is drawn twice counts as two subjects alike."""
    tested, rng = results(kind, 30, 4), np.random.default_rng(0)
    counts = rng.integers(0, 4, (2, 3, 30))
    found = TASKS[kind].measures(tested)(counts.astype(float))
    for row in np.ndindex(2, 3):
        drawn = np.repeat(np.arange(30), counts[row])
        single = [expected(kind, tested.labels[drawn], tested.outputs[drawn, s]) for s in (0, 1)]
        means = [np.mean([one[name] for one in single]) for name in TASKS[kind].metrics]
        assert found[row] == pytest.approx(means)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_constant_of_a_fold_changes_nothing_that_is_taken_within_folds(kind):
    """Networks of different folds need not be on one scale."""
    tested, task = results(kind, 48, 1), TASKS[kind]
    folds = np.arange(48) // 3 % 2
    apart = Results(tested.labels, tested.outputs, folds.astype(str), tested.thresholds)
    shift = folds[:, None, None] * (np.eye(3)[0] * 5 if kind == "multiclass" else 50.0)
    moved = Results(apart.labels, apart.outputs + shift, apart.groups, apart.thresholds)
    if kind == "multiclass":  # a class's probability is no simple shift of its logit, so its ranks may move a little
        assert measure(task, moved)[task.within] > 0.6
    else:
        assert measure(task, moved)[task.within] == pytest.approx(measure(task, apart)[task.within])
    assert np.isfinite(measure(task, apart)[task.within])


def test_a_class_that_nobody_has_is_left_out_of_the_means():
    tested = results("multiclass", 30, 0)
    part = tested.labels < 2
    some = Results(tested.labels[part], tested.outputs[part], tested.groups[part], tested.thresholds[part])
    found = measure(TASKS["multiclass"], some)
    called = some.outputs.argmax(-1)
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([np.mean(called[some.labels == k] == k) for k in (0, 1)])
    )
    assert np.isfinite(found["macro_auroc"])


@pytest.mark.parametrize("kind", TASKS)
def test_losses_are_least_at_the_truth_and_of_the_networks_outputs(kind):
    task = TASKS[kind]
    labels = torch.tensor([[0.0], [1.0]]) if task.classes else torch.tensor([[9.0], [18.0]])
    best = {"binary": [[-9.0], [9.0]], "multiclass": [[9.0, 0, 0], [0, 9.0, 0]], "regression": [[-1.0], [2.0]]}[kind]
    right = task.loss(torch.tensor(best), {"label": labels})
    assert right < 1e-3
    assert task.loss(torch.tensor(best).flip(0), {"label": labels}) > 1
    assert task.outputs == len(best[0])


def test_a_number_is_put_back_into_its_units():
    task = TASKS["regression"]
    labels = np.array([9.0, 18.0])
    assert task.in_units(task.scaled(labels)) == pytest.approx(labels)
    ages = np.random.default_rng(0).normal(10, 2, (20, 1))
    scaler = StandardScaler().fit(ages)
    own = Regression("age", mean=ages.mean(), sd=ages.std())
    assert own.scaled(ages) == pytest.approx(scaler.transform(ages))


def test_only_training_subjects_say_mean_and_sd(tmp_path):
    names = [f"s{i}" for i in range(9)]
    save_splits(splits_of({"train": names[:3], "validation": names[3:6], "test": names[6:]}), tmp_path / "splits.json")
    labels = dict(zip(names, [1.0, 2.0, 3.0, 50.0, 60.0, 70.0, 500.0, 600.0, 700.0], strict=True))
    task = task_of(Target("age", "regression", (), labels, ()), tmp_path / "splits.json")
    assert (task.mean, task.sd) == pytest.approx((2.0, np.std([1, 2, 3])))
    with pytest.raises(InputError, match="training set's values of 'age' do not differ"):
        task_of(Target("age", "regression", (), labels | dict.fromkeys(names[:3], 4.0), ()), tmp_path / "splits.json")


@pytest.mark.parametrize("kind", TASKS)
def test_facts_make_the_task_again(kind):
    task = TASKS[kind]
    again = task_from(task.facts())
    assert type(again) is type(task)
    assert again.facts() == task.facts()


@pytest.mark.parametrize("kind", TASKS)
def test_every_written_column_is_described(kind):
    task: Task = TASKS[kind]
    tested = results(kind, 12, 0, seeds=1)
    subjects = pd.DataFrame(tested.outputs[:, 0], columns=list(task.columns))
    table = task.table(subjects, 0.0)
    assert set(table) == set(task.describe())
    if kind == "multiclass":
        assert table[[f"probability_{name}" for name in CLASSES]].sum(axis=1).to_numpy() == pytest.approx(1)
        assert table["predicted"].tolist() == tested.outputs[:, 0].argmax(1).tolist()


@pytest.mark.parametrize("kind", TASKS)
def test_linear_models_learn_and_constant_ones_do_not_look(kind):
    rng, task = np.random.default_rng(3), TASKS[kind]
    tested = results(kind, 60, 3)
    labels = tested.labels.astype(int) if task.classes else tested.labels
    rows = np.stack([labels == k for k in range(3)], axis=1) + 0.1 * rng.normal(size=(60, 3))
    rows = rows if task.classes else tested.labels[:, None] + rng.normal(size=(60, 1))
    model, penalties, _ = task.linear(0)
    name, strengths = next(iter(penalties.items()))
    model.set_params(**{name: strengths[len(strengths) // 2]}).fit(rows, labels)
    good = Results(tested.labels, task.predict(model, rows)[:, None], tested.groups, np.zeros((60, 1)))
    assert measure(task, good)[task.metrics[0]] > 0.9
    constant = task.constant().fit(rows, labels)
    dull = Results(tested.labels, task.predict(constant, rows)[:, None], tested.groups, np.zeros((60, 1)))
    assert measure(task, dull)[task.metrics[0]] == pytest.approx(task.chance[task.metrics[0]])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_temperature_of_many_subjects_is_the_one_that_their_logits_were_given(classes):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, classes)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (shares.cumsum(1) > rng.random((20000, 1))).argmax(1).astype(float)
    task = Binary("d", ("a", "b")) if classes == 2 else Multiclass("d", tuple("abcd"))
    outputs = logits[:, 1:] - logits[:, :1] if classes == 2 else logits
    assert task.temperature(labels, 3 * outputs) == pytest.approx(3, rel=0.05)
    assert task.temperature(labels, 0 * outputs) == 1


@given(st.integers(2, 12), st.floats(0.1, 100), st.integers(0, 1000))
def test_a_temperature_is_the_best_of_all_and_finite_where_all_are_right(count, size, seed):
    """Against Platt's targets, of which the probability of a right answer is at most (N + 1) / (N + 2)."""
    labels = np.arange(count) % 2.0
    logits = size * np.random.default_rng(seed).uniform(0.5, 1, count) * (2 * labels - 1)
    heat = Binary("d", ("a", "b")).temperature(labels, logits[:, None])
    members = np.array([np.sum(labels == label) for label in labels])
    targets = np.where(labels == 1, (members + 1) / (members + 2), 1 / (members + 2))

    def loss(temperature: float) -> float:
        chances = expit(logits / temperature)
        return -float(np.mean(targets * np.log(chances) + (1 - targets) * np.log(1 - chances)))

    assert loss(heat) <= min(loss(heat * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2)) + 1e-9
    assert expit(np.abs(logits).min() / heat) < (members.max() + 1) / (members.max() + 2)


def test_logits_that_are_wrong_give_no_certainty_and_a_number_has_no_temperature():
    labels, logits = np.array([0.0, 1, 0, 1]), np.array([[3.0], [-3], [2], [-2]])
    assert expit(3 / Binary("d", ("a", "b")).temperature(labels, logits)) == pytest.approx(0.5, abs=0.001)
    assert Regression("age", mean=1.0, sd=2.0).temperature(labels, logits) == 1
