"""What a checkpoint knows of its training subjects, and what is said of others.

Not covered: distances themselves (test_unlike.py) and the way from a training to a served model (tests/configs).
"""

import io

import numpy as np
import pytest
import torch
from references import cohort, observed, reference
from tasks import BINARY

from bundle.errors import InputError
from bundle.evaluation.reference import findings, percentile_of, reference_of
from bundle.tasks.multiclass import Multiclass
from bundle.tasks.regression import Regression

TASKS = (BINARY, Multiclass("subtype", ("none", "mild", "severe")), Regression("age", mean=3.0, sd=2.0))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_it_survives_a_checkpoint_that_runs_no_code(task):
    validation = [one._replace(outputs=[[0.1] * task.outputs]) for one in cohort(9, 3, 1, len(task.classes) or 9)]
    made = reference_of(cohort(20, 3, 0), validation, task)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    one = observed("new", np.ones(3), np.random.default_rng(0))
    assert findings(read, one.features, one.acquisition) == findings(made, one.features, one.acquisition)
    assert read["participants"] == 20
    assert len(read["calibration"]["validation_percentiles"]) == 9


@pytest.mark.parametrize("count", [12, 40])
def test_subjects_of_the_same_population_are_flagged_at_most_at_the_nominal_rate(count):
    """All respects together; seeded, 25 trainings with 60 new subjects each."""
    percentiles = []
    for seed in range(25):
        rows = cohort(count + 60, 5, seed)
        made = reference_of(rows[:count], cohort(6, 5, 1000 + seed), BINARY)
        percentiles += [percentile_of(findings(made, one.features, one.acquisition)) for one in rows[count:]]
    for level in (0.9, 0.99):
        assert np.mean(np.array(percentiles) >= level) <= 1.5 * (1 - level), level


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": np.full(4, 9.0)}, "what the network reads of the scan"),
        (
            {"intensity": {"mean": 10.0, "SD beside the mean": 0.3, "fluctuation over time": -3.0}},
            "most of all mean (+",
        ),
        ({"coverage": {"the MNI brain": 0.9, "limbic": 0.4}}, "coverage, most of all limbic (-"),
        ({"motion": float(np.log(2.01))}, "the head moves more (2.00 mm on average)"),
        ({"tr": [2.0, 3.0]}, "the TR is 3 s, and of the training subjects 2 s"),
        (
            {"masks": ["voxels constant over time"]},
            "origin is 'voxels constant over time', and of the training subjects",
        ),
    ],
)
def test_each_respect_is_noticed_and_named(changes, words):
    made = reference(BINARY)
    usual = observed("new", np.zeros(4), np.random.default_rng(1))
    assert percentile_of(findings(made, usual.features, usual.acquisition)) < 0.9
    other = {"features": usual.features} | changes
    found = findings(made, other.pop("features"), usual.acquisition | other)
    assert percentile_of(found) > 0.99
    assert words in max(found).words


def test_lying_still_is_not_unlike_and_unknown_motion_is_no_respect():
    made = reference(BINARY)
    still = observed("new", np.zeros(4), np.random.default_rng(1), motion=-9.0)
    assert percentile_of(findings(made, still.features, still.acquisition)) < 0.9
    unknown = still.acquisition | {"motion": None}
    assert len(findings(made, still.features, unknown)) == 3
    silent = reference_of(cohort(20, 4, 0, motion=False), cohort(6, 4, 1), BINARY)
    assert silent["motion"] is None
    assert len(findings(silent, still.features, still.acquisition)) == 3


def test_a_tr_between_those_of_training_is_fine():
    rows = [one._replace(acquisition=one.acquisition | {"tr": [1.5 + i % 2]}) for i, one in enumerate(cohort(20, 4, 0))]
    made = reference_of(rows, cohort(6, 4, 1), BINARY)
    one = observed("new", np.zeros(4), np.random.default_rng(1))
    for tr, count in ((2.0, 4), (2.52, 4), (2.6, 5)):
        assert len(findings(made, one.features, one.acquisition | {"tr": [tr]})) == count, tr


def test_of_single_participants_it_holds_hashes_and_distances_only():
    rows = cohort(20, 4, 0)
    made = reference_of(rows, cohort(6, 4, 1), BINARY)
    assert made["hashes"]["training"] == sorted(f"hash of sub-{i:03d}" for i in range(20))
    for name in ("features", "intensity", "coverage"):
        sizes = {key: value.shape for key, value in made[name].items() if key != "names"}
        assert all(20 not in shape for key, shape in sizes.items() if key != "others"), name
        assert made[name]["others"].tolist() == sorted(made[name]["others"].tolist())  # in nobody's order


def test_the_threshold_is_that_of_the_validation_subjects():
    rng = np.random.default_rng(0)
    validation = [observed(f"v{i}", rng.normal(size=4), rng, i % 2) for i in range(8)]
    validation = [one._replace(outputs=[[-2.0], [4.0 * one.label]]) for one in validation]  # clips; means -1 and 1
    made = reference(BINARY, validation=validation)
    assert made["calibration"]["threshold"] == pytest.approx(0.0)
    assert made["calibration"]["validation_subjects"] == 8


def test_too_few_training_subjects_are_refused():
    with pytest.raises(InputError, match="holds 2 subjects, too few"):
        reference_of(cohort(2, 4, 0), cohort(6, 4, 1), BINARY)
