"""Training subjects that serving compares with, made without a training."""

from collections.abc import Sequence

import numpy as np

from bundle.evaluation.reference import Observed, reference_of
from bundle.tasks.task import Task

INTENSITY = ("mean", "SD beside the mean", "fluctuation over time")
COVERAGE = ("the MNI brain", "limbic")


def observed(name: str, features: np.ndarray, rng: np.random.Generator, label: float = 0, **about: object) -> Observed:
    """A participant of an ordinary scan, but for what is said."""
    usual = {
        "intensity": dict(zip(INTENSITY, rng.normal([7, 0.3, -3], 0.1), strict=True)),
        "coverage": dict(zip(COVERAGE, rng.normal(0.9, 0.02, 2), strict=True)),
        "motion": float(rng.normal(-2, 0.4)),
        "tr": [2.0],
        "masks": ["given"],
    }
    outputs = [[2.0 * label - 1.0 + float(rng.normal())]]
    return Observed(name, np.asarray(features, float), outputs, label, usual | about, {f"hash of {name}"})


def cohort(count: int, columns: int, seed: int, classes: int = 2, motion: bool = True) -> list[Observed]:
    """Participants of one population."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, columns))
    about = {} if motion else {"motion": None}
    return [observed(f"sub-{i:03d}", row, rng, i % classes, **about) for i, row in enumerate(rows)]


def reference(
    task: Task, count: int = 30, columns: int = 4, seed: int = 0, validation: Sequence[Observed] = ()
) -> dict:
    """What a checkpoint of such training subjects holds."""
    classes = len(task.classes) or count
    rest = list(validation) or cohort(12, columns, seed + 1, classes)
    return reference_of(cohort(count, columns, seed, classes), rest, task)
