"""What every task is: outputs of a network, scores of subjects, and measures over them.

A measure is computed from how often each subject is drawn, so that the same code gives its value (everybody once), its
bootstrap interval (drawn with replacement) and its mean over the seeds that have tested the subjects.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import structural_rank
from sklearn.base import BaseEstimator
from torch import Tensor

Floats = NDArray[np.float64]
Linear = tuple[BaseEstimator, dict[str, list[float]], str]
"""A linear model with an L2 penalty, the penalty's name with its strengths, and scikit-learn's name of a score."""
Measures = Callable[[Floats], Floats]
"""From how often each subject counts (..., n) to the task's measures (..., m), in the order of `Task.metrics`."""


@dataclass(frozen=True)
class Results:
    """Test results: n subjects, each tested once by each of s seeds.

    Attributes:
        labels: number of the class, or the value, (n,).
        outputs: of the networks, averaged over a subject's clips, (n, s, k); of a regression in the target's units.
        groups: who is ranked against whom, (n,): subjects of one fold, since outputs of different networks need not
            be on one scale.
        thresholds: of the network that tested a subject, (n, s); 0 where a task has none.
    """

    labels: Floats
    outputs: Floats
    groups: NDArray[np.str_]
    thresholds: Floats


class Task(ABC):
    """One kind of target.

    Args:
        column: what is predicted.
        classes: names of the classes in order; none of a regression.
        mean: of the training subjects' values; of a regression.
        sd: of the training subjects' values; of a regression.
    """

    kind: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    """Names of the measures, the first of which also chooses the best epoch: higher is better."""
    compared: ClassVar[tuple[str, str]]
    """Measures of which differences between strategies are tested: one of ranks or errors, and one that is a mean."""
    within: ClassVar[str]
    """The measure that is also taken within sites."""
    drawn: ClassVar[str]
    """What `draw` shows."""
    separation: ClassVar[str]
    """What `bundle.evaluation.attribution` calls separation."""

    def __init__(self, column: str, classes: Sequence[str] = (), mean: float = 0.0, sd: float = 1.0) -> None:
        self.column, self.classes, self.mean, self.sd = column, tuple(classes), float(mean), float(sd)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint has to know of it, JSON; see `bundle.tasks.kinds.task_from`."""
        facts = {"kind": self.kind, "column": self.column, "classes": list(self.classes)}
        return facts | {"mean": self.mean, "sd": self.sd}

    @property
    @abstractmethod
    def chance(self) -> dict[str, float]:
        """What knows nothing scores, of the measures of which this is one number: the two that are drawn."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that hold a subject's outputs; the network has as many."""

    @property
    def outputs(self) -> int:
        """How many numbers the network gives."""
        return len(self.columns)

    @abstractmethod
    def loss(self, prediction: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Scalar loss of outputs (b, k) and `{"label": (b, 1)}`."""

    def scaled(self, labels: Any) -> Any:
        """Labels, array or tensor, as a network is to give them: of a regression in SD of the training subjects."""
        return labels

    def in_units(self, outputs: Floats) -> Floats:
        """Outputs (..., k) as they are kept: of a regression in the target's units."""
        return outputs

    def threshold(self, labels: Floats, outputs: Floats) -> float:
        """What is to be fixed on validation subjects (n,), (n, k) for the decision; 0 where there is nothing."""
        return 0.0

    def temperature(self, labels: Floats, outputs: Floats) -> float:
        """By what outputs are to be divided so that probabilities hold on validation subjects (n,), (n, k); else 1."""
        return 1.0

    @abstractmethod
    def decisions(self, outputs: Floats, threshold: float) -> dict[str, Floats]:
        """Further columns of subjects (n, k): probabilities, and what is predicted."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What each of the columns means."""

    @property
    def limited(self) -> tuple[str, ...]:
        """Columns of which limits over the networks of an ensemble are given."""
        return tuple(name for name in self.describe() if name.startswith("probability"))

    @abstractmethod
    def measures(self, tested: Results) -> Measures:
        """The measures as a function of how often each subject counts."""

    @abstractmethod
    def gains(self, tested: Results, metric: str) -> Floats | None:
        """A subject's own part in one of `compared`, (n,), the more the better; None if ranks make the measure."""

    @abstractmethod
    def rankings(self, tested: Results) -> list[tuple[Floats, NDArray[np.bool_]]]:
        """Scores (n, s) and who should score higher (n,), of each AUROC that the first measure is the mean of."""

    @abstractmethod
    def reference(self, labels: Floats) -> dict[str, float]:
        """What an answer without any input scores on test subjects (n,), by name."""

    @abstractmethod
    def draw(self, axes: Any, tested: Results) -> None:
        """Draw what a reader looks at first into matplotlib axes: calibration, a confusion matrix or a scatter."""

    @abstractmethod
    def linear(self, seed: int) -> Linear:
        """A linear model with an L2 penalty, its strengths to choose from, and scikit-learn's name of the score."""

    @abstractmethod
    def predict(self, model: BaseEstimator, rows: Any) -> Floats:
        """Outputs (n, k) of a scikit-learn model that was fitted to labels."""

    @abstractmethod
    def constant(self) -> BaseEstimator:
        """A scikit-learn model that does not look at its input."""

    def strata(self, labels: Floats) -> list[NDArray[np.int64]]:
        """Positions of the subjects that are resampled apart: everybody, or the members of each class."""
        return [np.arange(len(labels))]

    def trials(self, tested: Results) -> dict[str, int]:
        """Independent trials behind each measure that is 1 where all of them succeed, see `with_intervals`."""
        return {}

    def table(self, subjects: pd.DataFrame, threshold: float) -> pd.DataFrame:
        """Subjects' table with `decisions` added."""
        return subjects.assign(**self.decisions(subjects[list(self.columns)].to_numpy(float), threshold))


def ranked_pairs(tested: Results, scores: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Share of seeds in which each positive scores above each other, ties one half, and whether the two are compared.

    Args:
        tested: whose groups say who is compared.
        scores: (n, s).
        positive: (n,).

    Returns:
        Two (positives, others); the second is 1 within a group, else 0.
    """
    above = np.zeros((positive.sum(), (~positive).sum()))
    for seed in range(scores.shape[1]):
        above += pairs_above(scores[positive, seed], scores[~positive, seed])
    same = tested.groups[positive][:, None] == tested.groups[~positive][None]
    return above / scores.shape[1], same.astype(float)


def pairs_above(first: Floats, second: Floats) -> Floats:
    """Whether each of `first` (n,) scores above each of `second` (m,), (n, m): 1 or 0, and one half for a tie."""
    return (1 + np.sign(np.subtract.outer(first, second))) / 2


def auroc_of_drawn(first: Floats, second: Floats, above: Floats, weights: Floats) -> Floats:
    """AUROC of subjects that are drawn so often: (..., n), (..., m), and `pairs_above` with weights, (n, m) each."""
    with np.errstate(invalid="ignore"):  # where no pair is compared
        return (first @ (above * weights) * second).sum(-1) / (first @ weights * second).sum(-1)


def auroc(tested: Results, scores: Floats, positive: NDArray[np.bool_]) -> Measures:
    """AUROC as a function of how often each subject counts: over pairs of one group, the mean over seeds."""
    above, weights = ranked_pairs(tested, scores, positive)
    return lambda counts: auroc_of_drawn(counts[..., positive], counts[..., ~positive], above, weights)


def independent_pairs(tested: Results, positive: NDArray[np.bool_]) -> int:
    """How many disjoint pairs of a positive and another of the same group there are."""
    same = tested.groups[positive][:, None] == tested.groups[~positive][None]
    return int(structural_rank(csr_array(same.astype(float)))) if same.size else 0


def mean_of(values: Floats, members: NDArray[np.bool_] | None = None) -> Measures:
    """The mean of values (n,), of some of the subjects, as a function of how often each counts; NaN of nobody."""
    weights = np.ones(len(values)) if members is None else members.astype(float)

    def mean(counts: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return (counts @ (values * weights)) / (counts @ weights)

    return mean


def seeds_of(outputs: Floats) -> Iterator[Floats]:
    """The outputs (n, k) of each seed."""
    yield from np.moveaxis(outputs, 1, 0)
