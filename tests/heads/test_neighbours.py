"""Nearest neighbours, against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from tasks import BINARY

from bundle.errors import InputError
from bundle.heads.neighbours import FEWEST, TEMPERATURE, NearestNeighbours
from bundle.tasks.multiclass import Multiclass
from bundle.tasks.regression import Regression

SIZE = {"image_size": (48, 48, 48), "frames": 2, "embed_dim": 4, "depths": (1, 1, 1, 1)}
TASKS = {"binary": BINARY, "multiclass": Multiclass("group", ("a", "b", "c")), "regression": Regression("age")}


def cohort(n: int, kind: str) -> tuple[list[torch.Tensor], np.ndarray]:
    """Runs of three clips whose features depend on the label."""
    rng = np.random.default_rng(0)
    labels = (
        np.arange(n) % 3 if kind == "multiclass" else np.arange(n) % 2 if kind == "binary" else rng.normal(10, 2, n)
    )
    centre = rng.normal(size=(1, 32)) * labels[:, None]
    return [torch.from_numpy(row + rng.normal(size=(3, 32))) for row in centre], labels.astype(float)


@pytest.mark.parametrize("kind", TASKS)
def test_votes_are_those_of_scikit_learns_neighbours(kind):
    runs, labels = cohort(40, kind)
    task = TASKS[kind]
    head = NearestNeighbours(**SIZE, outputs=task.outputs, neighbours=7)
    head.fit(runs[:30], labels[:30].tolist(), task)
    found = head(torch.cat(runs[30:]), [3] * 10).double().numpy()

    rows = np.stack([run.mean(0).numpy() for run in runs])
    scaler = StandardScaler().fit(rows[:30])
    search = NearestNeighbors(n_neighbors=7, metric="cosine").fit(scaler.transform(rows[:30]))
    distance, who = search.kneighbors(scaler.transform(rows[30:]))
    weights = softmax((1 - distance) / TEMPERATURE, axis=1)
    voted = labels[:30][who]
    if kind == "regression":
        assert task.in_units(found)[:, 0] == pytest.approx((weights * voted).sum(1), rel=1e-5)
        return
    shares = np.stack([(weights * (voted == k)).sum(1) for k in range(len(task.classes))], axis=1)
    if kind == "binary":
        assert expit(found[:, 0]) == pytest.approx(shares[:, 1].clip(FEWEST, 1 - FEWEST), rel=1e-5)
    else:
        assert np.exp(found) == pytest.approx(shares.clip(FEWEST), rel=1e-5)
    assert np.mean((found.argmax(1) if kind == "multiclass" else found[:, 0] > 0) == labels[30:]) > 0.6


def test_the_state_goes_into_a_twin_and_other_settings_are_refused():
    runs, labels = cohort(12, "binary")
    head = NearestNeighbours(**SIZE, neighbours=3)
    with pytest.raises(InputError, match="NearestNeighbours was not fitted"):
        head(runs[0])
    head.fit(runs, labels.tolist(), BINARY)
    twin = NearestNeighbours(**SIZE, neighbours=3)
    twin.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(twin(runs[0]), head(runs[0]))
    with pytest.raises(InputError, match="fitted with neighbours 3, but here it is 4"):
        NearestNeighbours(**SIZE, neighbours=4).load_state_dict(head.state_dict())
    with pytest.raises(InputError, match="neighbours must be at least 1"):
        NearestNeighbours(**SIZE, neighbours=0)
    with pytest.raises(InputError, match="is fitted, not trained"):
        NearestNeighbours(**SIZE, freeze=False)


def test_features_are_the_mean_over_tokens():
    head = NearestNeighbours(**SIZE)
    image = torch.randn(2, 1, 48, 48, 48, 2)
    assert torch.allclose(head.features(image), head.encoder(image).flatten(2).mean(-1), atol=1e-6)


def test_a_feature_without_spread_and_few_runs_are_no_obstacle():
    runs = [torch.ones(2, 32), torch.ones(2, 32) + torch.arange(32)]
    head = NearestNeighbours(**SIZE, neighbours=10)
    head.fit(runs, [0.0, 1.0], BINARY)
    assert head(torch.cat(runs), [2, 2])[:, 0].tolist() == pytest.approx([-np.log(99), np.log(99)], rel=1e-3)


def test_a_participant_has_one_vote_whatever_the_number_of_their_runs():
    """Ten identical runs of one participant beside two participants of the other class, who are a little farther."""
    rng = np.random.default_rng(1)
    centre, far = torch.from_numpy(rng.normal(size=(2, 1, 32)))
    others = [centre + 0.01 * torch.from_numpy(rng.normal(size=(1, 32))) for _ in range(2)]
    runs = [centre] * 10 + others + [far] * 3
    labels = [1.0] * 10 + [0.0] * 5
    names = ["a"] * 10 + ["b", "c", "d", "e", "f"]
    head = NearestNeighbours(**SIZE, neighbours=3)
    head.fit(runs, labels, BINARY, participants=names)
    assert head(centre)[0, 0] < 0  # two of its three nearest participants are of class 0

    once = NearestNeighbours(**SIZE, neighbours=3)
    once.fit(runs[9:], labels[9:], BINARY, participants=names[9:])
    assert head(centre).item() == pytest.approx(once(centre).item())
    head.fit(runs, labels, BINARY)
    assert head(centre)[0, 0] > 0


def test_a_participant_is_the_mean_of_their_runs():
    runs, labels = cohort(20, "regression")
    task = TASKS["regression"]
    head = NearestNeighbours(**SIZE, outputs=1)
    head.fit(runs, np.repeat(labels[::2], 2).tolist(), task, participants=[n // 2 for n in range(20)])
    joined = NearestNeighbours(**SIZE, outputs=1)
    joined.fit([torch.cat(runs[n : n + 2]) for n in range(0, 20, 2)], labels[::2].tolist(), task)
    assert torch.allclose(head(runs[3]), joined(runs[3]))
