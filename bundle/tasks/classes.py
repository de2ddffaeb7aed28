"""What tasks share that tell classes apart."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from bundle.tasks.task import Floats, Linear, Results, Task

PENALTIES = [10.0**k for k in range(-4, 3)]


class OfClasses(Task):
    """Two classes or more: a subject is called right or wrong, and classes are resampled apart."""

    scoring: ClassVar[str]
    """Scikit-learn's name of the score that chooses a penalty."""

    @abstractmethod
    def right(self, tested: Results) -> Floats:
        """Share of seeds that are right about each subject, (n,)."""

    def gains(self, tested: Results, metric: str) -> Floats | None:
        """Whether a subject is called right."""
        return self.right(tested) if metric == "accuracy" else None

    def strata(self, labels: Floats) -> list[NDArray[np.int64]]:
        """The members of each class."""
        return [np.flatnonzero(labels == number) for number in reversed(range(len(self.classes)))]

    def linear(self, seed: int) -> Linear:
        """Logistic regression."""
        return LogisticRegression(max_iter=5000, random_state=seed), {"C": PENALTIES}, self.scoring

    def constant(self) -> BaseEstimator:
        """The classes' shares in the training set."""
        return DummyClassifier(strategy="prior")
