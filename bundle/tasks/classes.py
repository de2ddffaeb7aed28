"""What tasks share that tell classes apart."""

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from bundle.tasks.task import Floats, Linear, Results, Task

PENALTIES = [10.0**k for k in range(-4, 3)]
SHARPNESS = (math.log(1e-3), math.log(1e3))
"""Log of the largest logit, after the temperature: between no answer and certainty."""


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

    def temperature(self, labels: Floats, outputs: Floats) -> float:
        """The temperature of validation subjects (n,), (n, k) (Guo et al. 2017, arXiv 1706.04599).

        The least cross-entropy, against Platt's smoothed targets (1999, Advances in Large Margin Classifiers): of N
        subjects of a class the target is (N + 1) / (N + classes) for it, and 1 / (N + classes) for each other. Against
        0 and 1, few subjects that all come out right would ask for probabilities of 0 and 1.
        """
        own = outputs if outputs.shape[1] > 1 else np.hstack([np.zeros_like(outputs), outputs])
        size = float(np.abs(own).max())
        if size == 0:
            return 1.0
        members = labels[:, None] == np.arange(own.shape[1])  # (n, classes)
        sizes = members.sum(0)[labels.astype(int)][:, None]  # of each one's class
        targets = (members * sizes + 1) / (sizes + own.shape[1])

        def entropy(log_sharpness: float) -> float:
            return -float((targets * log_softmax(np.exp(log_sharpness) / size * own, axis=1)).sum())

        found = minimize_scalar(entropy, bounds=SHARPNESS, method="bounded", options={"xatol": 1e-6})
        return size / float(np.exp(found.x))

    def strata(self, labels: Floats) -> list[NDArray[np.int64]]:
        """The members of each class."""
        return [np.flatnonzero(labels == number) for number in reversed(range(len(self.classes)))]

    def linear(self, seed: int) -> Linear:
        """Logistic regression."""
        return LogisticRegression(max_iter=5000, random_state=seed), {"C": PENALTIES}, self.scoring

    def constant(self) -> BaseEstimator:
        """The classes' shares in the training set."""
        return DummyClassifier(strategy="prior")
