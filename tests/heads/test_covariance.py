"""The covariance readout: a planted coupling, and the same by nilearn and scikit-learn alone.

Not covered: what real data hold.
"""

import io

import numpy as np
import pytest
import torch
from nilearn.connectome import ConnectivityMeasure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler
from tasks import BINARY

from bundle.errors import InputError
from bundle.heads.covariance import CovarianceReadout
from bundle.tasks.multiclass import Multiclass
from bundle.tasks.regression import Regression
from bundle.tasks.task import Task

SMALL = {"frames": 10, "embed_dim": 4, "depths": [1, 1]}
PARCELS = 8
MEMBERS = ((0, 1), (2,), (3, 4, 5), (6,), (7,), (8,), (9,), (10,))  # labels of each parcel
LABELS = 11


def readout(**changes) -> CovarianceReadout:
    """The readout, of eight parcels of few labels instead of the atlas'."""
    torch.manual_seed(0)
    network = CovarianceReadout(**(SMALL | {"components": {"group": [1]}} | changes))
    network.parcels |= {"group": [list(members) for members in MEMBERS], "label": [[k] for k in range(LABELS)]}
    return network


def cohort(people: int, seed: int, coupling: float = 0.7, clips: int = 12) -> tuple[list[torch.Tensor], np.ndarray]:
    """Runs (C, 10, 11, 4) with one source per parcel; in cases those of the first two parcels are coupled.

    A parcel's labels have its source in channels of their own, with either sign.

    Around a static value per parcel, and beside noise in all channels.
    """
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(LABELS, 4))
    mixing /= np.linalg.norm(mixing, axis=1, keepdims=True)
    parcel_of = np.repeat(np.arange(PARCELS), [len(members) for members in MEMBERS])
    labels = np.arange(people) % 2
    runs = []
    for label in labels:
        source = rng.normal(size=(clips * 10, PARCELS))
        if label:
            source[:, 1] = coupling * source[:, 0] + np.sqrt(1 - coupling**2) * source[:, 1]
        values = source[:, parcel_of, None] * mixing + 0.1 * rng.normal(size=(len(source), LABELS, 4))
        values += rng.normal(size=(1, LABELS, 4))
        runs.append(torch.tensor(values, dtype=torch.float32).view(clips, 10, LABELS, 4))
    return runs, labels


def scores(network: CovarianceReadout, runs: list[torch.Tensor]) -> np.ndarray:
    return network(torch.cat(runs), [len(run) for run in runs])[:, 0].numpy()


@pytest.mark.parametrize("subtract", ["clip_mean", "training_mean", None])
def test_a_planted_coupling_is_found(subtract):
    network = readout(subtract=subtract)
    network.fit(*cohort(40, 0), BINARY)
    runs, labels = cohort(40, 1)
    assert roc_auc_score(labels, scores(network, runs)) > 0.95


def test_shuffled_labels_score_about_one_half():
    """Mean over five shufflings that are balanced against the truth; its SD by chance is about 0.05."""
    runs, _ = cohort(40, 0)
    others, labels = cohort(40, 1)
    found = []
    for seed in range(5):
        shuffled = np.empty(40)
        rng = np.random.default_rng(seed)
        for group in (0, 1):
            shuffled[group::2] = rng.permutation(np.repeat([0, 1], 10))
        network = readout()
        network.fit(runs, shuffled, BINARY)
        found.append(roc_auc_score(labels, scores(network, others)))
    assert np.mean(found) == pytest.approx(0.5, abs=0.2)


def test_the_result_is_that_of_nilearn_and_scikit_learn():
    (runs, labels), (others, _) = cohort(24, 0, 0.3), cohort(6, 1, 0.3)

    def deviations(run):
        values = run.numpy().astype(np.float64)
        values = (values - values.mean(0)).reshape(-1, LABELS, 4)
        line = np.stack([np.ones(len(values)), np.arange(len(values))], axis=1)
        fitted, *_ = np.linalg.lstsq(line, values.reshape(len(values), -1))
        return values - (line @ fitted).reshape(values.shape)

    def courses(run):
        parts = [
            deviations(run)[:, members].reshape(-1, 4 * len(members)) @ axis
            for members, axis in zip(MEMBERS, axes, strict=True)
        ]
        return np.stack([part / part.std() for part in parts], axis=1)

    joined = np.concatenate([deviations(run) for run in runs])
    axes = [
        np.linalg.svd(joined[:, members].reshape(len(joined), -1), full_matrices=False)[2][0] for members in MEMBERS
    ]
    measure, scaler = ConnectivityMeasure(kind="tangent", vectorize=True, standardize=False), StandardScaler()
    rows = scaler.fit_transform(measure.fit_transform([courses(run) for run in runs]))
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    choices = {"C": 10.0 ** np.arange(-4, 3)}
    search = GridSearchCV(LogisticRegression(max_iter=5000), choices, scoring="roc_auc", cv=folds).fit(rows, labels)
    expected = search.decision_function(scaler.transform(measure.transform([courses(run) for run in others])))
    network = readout()
    network.fit(runs, labels, BINARY, seed=3)
    found = scores(network, others)
    # to single precision: an axis and its mirror image are the same component
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    alone = [network(run).item() for run in others]
    np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_what_repeats_in_every_clip_does_not_count():
    (runs, labels), (others, _) = cohort(24, 0), cohort(6, 1)
    repeated = 3 * torch.randn(10, LABELS, 4)
    plain, fixed, none = readout(), readout(), readout(subtract=None)
    plain.fit(runs, labels, BINARY)
    fixed.fit([run + repeated for run in runs], labels, BINARY)
    none.fit(runs, labels, BINARY)
    torch.testing.assert_close(
        torch.tensor(scores(plain, others)),
        torch.tensor(scores(fixed, [run + repeated for run in others])),
        rtol=1e-3,
        atol=1e-3,
    )
    moved = scores(none, [run + repeated for run in others]) - scores(none, others)
    assert np.abs(moved).max() > 0.1


def test_the_state_goes_through_a_file_and_other_settings_are_refused():
    (runs, labels), (others, _) = cohort(24, 0), cohort(6, 1)
    network = readout(components={"group": [2]})
    network.fit(runs, labels, BINARY)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = readout(components={"group": [2]})
    with pytest.raises(InputError, match="was not fitted"):
        scores(again, others)
    again.load_state_dict(state, strict=True)
    np.testing.assert_array_equal(scores(again, others), scores(network, others))
    with pytest.raises(InputError, match="fitted with stage 1, but here it is 0"):
        readout(components={"group": [2]}, stage=0).load_state_dict(state)
    with pytest.raises(InputError, match=r"\(10, 11, 4\), not \(9, 11, 4\)"):
        again(others[0][:, :9])
    with pytest.raises(InputError, match="one clip"):
        again(others[0][:1])


def test_nothing_is_learnt_from_who_is_scored():
    """A score is the same alone, and beside runs of another scale."""
    (runs, labels), (others, _) = cohort(24, 0), cohort(6, 1)
    network = readout()
    network.fit(runs, labels, BINARY)
    before = {name: tensor.clone() for name, tensor in network.fitted.items()}
    found = scores(network, others)
    beside = scores(network, [*others[:3], *(100 * run**3 for run in others[3:])])
    np.testing.assert_allclose(beside[:3], found[:3], rtol=1e-6)
    assert all(torch.equal(network.fitted[name], tensor) for name, tensor in before.items())
    again = readout()
    again.fit(runs, labels, BINARY)
    np.testing.assert_array_equal(scores(again, others), found)


def test_runs_of_a_participant_are_one_row():
    runs, labels = cohort(24, 0)
    network, halves = readout(subtract=None), readout(subtract=None)
    scaled = [run for pair in zip(runs, runs, strict=True) for run in pair]
    network.fit(runs, labels, BINARY)
    halves.fit(scaled, np.repeat(labels, 2), BINARY, participants=np.repeat(np.arange(24), 2).tolist())
    # a run twice has the same courses, but is shrunk less
    assert np.corrcoef(scores(network, runs), scores(halves, runs))[0, 1] > 0.99
    with pytest.raises(InputError, match="1 of class 0, 1 of class 1"):
        readout().fit(runs[:4], labels[:4], BINARY, participants=["a", "b", "a", "b"])


def test_a_parcel_outside_a_brain_counts_as_still():
    (runs, labels), (others, _) = cohort(24, 0), cohort(6, 1)
    for run in [*runs[:3], *others[:2]]:
        run[:, :, 8] = 0.3
    for run in [*runs, *others]:
        run[:, :, 10] = 0.3
    network = readout()
    network.fit(runs, labels, BINARY)
    assert np.isfinite(scores(network, others)).all()


def test_what_labels_average_away_is_found():
    """The two coupled sources have opposite signs in two labels of each parcel, so that its mean does not show them."""
    runs, labels = cohort(40, 0)
    others, truth = cohort(40, 1)

    def opposed(run: torch.Tensor) -> torch.Tensor:
        changed = run.clone()
        changed[:, :, [0, 3]], changed[:, :, [1, 4]] = run[:, :, [0, 2]], -run[:, :, [0, 2]]
        changed[:, :, 2] = 0.3
        changed[:, :, 5] = 0.3
        return changed

    network = readout()
    network.parcels["group"] = [[0, 1], [3, 4], *([k] for k in range(6, LABELS))]
    network.fit([opposed(run) for run in runs], labels, BINARY)
    assert roc_auc_score(truth, scores(network, [opposed(run) for run in others])) > 0.95


def test_as_many_components_are_taken_as_the_training_participants_ask_for():
    """A louder source of its own in every parcel is the first component; what differs is in the second."""
    loud = 4 * np.random.default_rng(98).normal(size=(LABELS, 4))
    parcel_of = np.repeat(np.arange(PARCELS), [len(members) for members in MEMBERS])

    def drowned(run: torch.Tensor, seed: int) -> torch.Tensor:
        source = np.random.default_rng(seed).normal(size=(12, 10, PARCELS))[..., parcel_of, None]
        return run + torch.tensor(source * loud, dtype=torch.float32)

    (runs, labels), (others, truth) = cohort(40, 0), cohort(40, 1)
    runs = [drowned(run, seed) for seed, run in enumerate(runs)]
    others = [drowned(run, 100 + seed) for seed, run in enumerate(others)]
    one, either = readout(components={"group": [1]}), readout(components={"group": [2, 1]})
    for network in (one, either):
        network.fit(runs, labels, BINARY)
    assert either.fitted["group.basis"].shape[-1] == 2
    assert roc_auc_score(truth, scores(either, others)) > 0.9
    assert roc_auc_score(truth, scores(one, others)) < 0.8
    plain = readout(components={"group": [1, 2]})
    plain.fit(*cohort(40, 0), BINARY)
    assert plain.fitted["group.basis"].shape[-1] == 1  # the second is noise


def test_what_labels_tell_and_their_groups_do_not_is_found_by_both_levels_together():
    """What differs is in one label of each of two groups, another of which is louder."""

    def drowned(run: torch.Tensor, seed: int) -> torch.Tensor:
        louder = run.clone()
        loud = np.random.default_rng(seed).normal(size=(12, 10, 2))
        louder[:, :, 1] += 4 * torch.tensor(loud[..., :1], dtype=torch.float32)
        louder[:, :, 2] = run[:, :, 3] + 4 * torch.tensor(loud[..., 1:], dtype=torch.float32)
        louder[:, :, 3] = run[:, :, 2]
        return louder

    (runs, labels), (others, truth) = cohort(40, 0), cohort(40, 1)
    runs = [drowned(run, seed) for seed, run in enumerate(runs)]
    others = [drowned(run, 100 + seed) for seed, run in enumerate(others)]
    made = {}
    for components in ({"group": [1]}, {"group": [1], "label": [1]}):
        network = made["+".join(components)] = readout(components=components)
        network.parcels["group"] = [[0, 1], [2, 3], *([k] for k in range(4, LABELS))]
        network.fit(runs, labels, BINARY)
    assert roc_auc_score(truth, scores(made["group"], others)) < 0.8
    assert roc_auc_score(truth, scores(made["group+label"], others)) > 0.85
    again = readout(components={"group": [1], "label": [1]})
    again.load_state_dict(made["group+label"].state_dict())
    np.testing.assert_array_equal(scores(again, others), scores(made["group+label"], others))
    turned = readout(components={"label": [1], "group": [1]})
    turned.load_state_dict(made["group+label"].state_dict())
    np.testing.assert_array_equal(scores(turned, others), scores(made["group+label"], others))
    older = made["group+label"].state_dict()
    older["_extra_state"]["fitted"]["basis"] = older["_extra_state"]["fitted"].pop("label.basis")
    with pytest.raises(InputError, match="earlier version"):
        again.load_state_dict(older)
    np.testing.assert_array_equal(scores(again, others), scores(made["group+label"], others))


def test_levels_speak_by_how_they_score_on_participants_held_back_whatever_the_size_of_their_outputs():
    """Outputs of levels by themselves, brought to one SD and weighed by AUROC - 0.5, both as scikit-learn has them."""
    (runs, labels), (others, _) = cohort(24, 0, 0.3), cohort(6, 1, 0.3)
    both = readout(components={"group": [1], "label": [1]})
    both.fit(runs, labels, BINARY, seed=3)
    deviations, means, spreads, skills = [], [], [], []
    for level in ("group", "label"):
        alone = readout(components={level: [1]})
        alone.fit(runs, labels, BINARY, seed=3)
        means.append(scores(alone, runs).mean())
        deviations.append(scores(alone, others) - means[-1])
        rows = StandardScaler().fit_transform(alone.vectors(torch.cat(runs), [len(run) for run in runs]))
        folds = StratifiedKFold(5, shuffle=True, random_state=3)
        choices = {"C": 10.0 ** np.arange(-4, 3)}
        search = GridSearchCV(LogisticRegression(max_iter=5000), choices, scoring="roc_auc", cv=folds)
        chosen = search.fit(rows, labels).best_estimator_
        skills.append(search.best_score_ - 0.5)
        spreads.append(cross_val_predict(chosen, rows, labels, cv=folds, method="decision_function").std())
    standardised = [deviation / spread for deviation, spread in zip(deviations, spreads, strict=True)]
    assert spreads[0] != pytest.approx(spreads[1], rel=0.1)
    assert skills[0] != pytest.approx(skills[1], rel=0.1)
    expected = np.average(standardised, axis=0, weights=skills) * np.average(spreads, weights=skills)
    expected += np.average(means, weights=skills)
    np.testing.assert_allclose(scores(both, others), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("task", [BINARY, Multiclass("site", ("a", "b", "c")), Regression("age", mean=3.0, sd=2.0)])
def test_the_mean_output_over_the_training_runs_lies_between_those_of_the_levels(task: Task):
    """However unlike in number the classes are: what is scaled is deviations."""
    runs, _ = cohort(36, 0, 0.3)
    truth = {"binary": [0] * 26 + [1] * 10, "multiclass": [0] * 20 + [1] * 10 + [2] * 6, "regression": range(36)}
    outputs = 3 if task.kind == "multiclass" else 1
    means = []
    for components in ({"group": [1]}, {"label": [1]}, {"group": [1], "label": [1]}):
        network = readout(components=components, outputs=outputs)
        network.fit(runs, [float(value) for value in truth[task.kind]], task)
        means.append(network(torch.cat(runs), [len(run) for run in runs]).mean(0).numpy())
    assert means[2].shape == (outputs,)
    assert (means[2] >= np.minimum(means[0], means[1]) - 1e-3).all()
    assert (means[2] <= np.maximum(means[0], means[1]) + 1e-3).all()


def test_a_level_of_one_course_is_left_out():
    runs, labels = cohort(24, 0)
    alone = readout(components={"group": [1]})
    alone.fit(runs, labels, BINARY)
    both = readout(components={"group": [1], "label": [1]})
    both.parcels["label"] = [[k] for k in range(1)]  # one course: no covariance at all
    both.fit(runs, labels, BINARY)
    assert not any(name.startswith("label") for name in both.fitted)
    np.testing.assert_allclose(scores(both, runs), scores(alone, runs), rtol=1e-6)
    only = readout(components={"label": [1]})
    only.parcels["label"] = [[0]]
    with pytest.raises(InputError, match="one component of one parcel"):
        only.fit(runs, labels, BINARY)


def test_distances_are_of_the_level_with_the_fewest_parcels():
    runs, labels = cohort(24, 0)
    network, groups = (readout(components=components) for components in ({"group": [1], "label": [1]}, {"group": [1]}))
    for each in (network, groups):
        each.fit(runs, labels, BINARY)
    features, counts = torch.cat(runs[:3]), [len(run) for run in runs[:3]]
    assert torch.equal(network.seen(features, counts), torch.from_numpy(groups.vectors(features, counts)))
    assert network.vectors(features, counts).shape == (3, PARCELS * (PARCELS + 1) // 2 + LABELS * (LABELS + 1) // 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_features_are_read_from_images(stage: int):
    torch.manual_seed(0)
    network = CovarianceReadout(**SMALL, components={"group": [1]}, stage=stage)
    image = torch.randn(2, 1, 96, 96, 96, 10)
    features = network.features(image)
    assert sorted(row for rows in network.parcels["group"] for row in rows) == list(range(features.shape[2]))
    assert features.shape == (2, 10, len(network.shares), 4 * 2 ** max(stage - 1, 0))
    assert features.dtype == torch.float32
    if stage == 1:
        runs = [features + torch.randn(features.shape) for _ in range(12)]
        network.fit(runs, [0, 1] * 6, BINARY)
        torch.testing.assert_close(network(image), network(features))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freeze": False}, "stays frozen"),
        ({"subtract": "mean"}, "subtract must be"),
        ({"components": {"label": [1], "group": [1, 5]}}, "components must be numbers of 1 to 4"),
        ({"components": {"group": []}}, "components must be numbers"),
        ({"components": {}}, "components must be numbers"),
        ({"components": [1]}, r"components must be numbers of 1 to 4.* by level, .* not \[1\]"),
        ({"components": {"voxel": [1]}}, "level must be one of label, group, not 'voxel'"),
        ({"stage": 3}, "stage must be 0 to 2"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(change: dict, words: str):
    with pytest.raises(InputError, match=words):
        readout(**change)
