"""Connectivity and a linear classifier: one row per participant, tuned inside the training set."""

import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from nilearn.connectome import ConnectivityMeasure
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from bundle.errors import InputError

PENALTIES = tuple(10.0**k for k in range(-4, 3))
KINDS = ("correlation", "tangent")


def least_class(labels: NDArray) -> int:
    """Members of the smaller class of labels 0 and 1.

    Raises:
        InputError: there are fewer than two.
    """
    controls, cases = np.bincount(np.asarray(labels, int), minlength=2)
    if min(cases, controls) < 2:
        raise InputError(
            f"the training set holds {cases} cases and {controls} controls, too few to learn from; make other splits"
        )
    return int(min(cases, controls))


class ConnectivityClassifier(BaseEstimator):
    """Connectivity, scaling and a linear classifier with an L2 penalty; kind and penalty are tuned in inner folds.

    Connectivity (the tangent space's reference too) and scaling see no label, and are fitted once to all rows that are
    given: the training participants. The classifier works in the span of these rows, n numbers per row instead of one
    per pair of regions. As an L2 penalty keeps its weights in that span, the result is the same; it is what makes
    hundreds of participants a matter of seconds.

    Args:
        classifier: linear, with an L2 penalty of strength `C`, such as `LogisticRegression` or `LinearSVC`.
        seed: of the inner folds.
        inner_folds: how many; fewer where a class has fewer members.
        kinds: of connectivity to choose from, as in nilearn's `ConnectivityMeasure`.
        discard_diagonal: leave the variances out.

    Attributes:
        connectivity_: the fitted `ConnectivityMeasure`.
        weights_: (features,) of connectivity as it is, scaling included.
        bias_: its constant.
        best_params_: the chosen kind and C.
        best_score_: their AUROC in the inner folds.
    """

    def __init__(
        self,
        classifier: BaseEstimator,
        seed: int = 0,
        inner_folds: int = 5,
        kinds: Sequence[str] = KINDS,
        discard_diagonal: bool = True,
    ) -> None:
        self.classifier = classifier
        self.seed = seed
        self.inner_folds = inner_folds
        self.kinds = kinds
        self.discard_diagonal = discard_diagonal

    def fit(self, rows: Sequence[NDArray], labels: NDArray) -> Self:
        """Fit to courses (T, regions) of each participant, and labels 0 or 1 (n,).

        Raises:
            InputError: there are fewer than two cases or two controls.
        """
        labels = np.asarray(labels, int)
        members = min(self.inner_folds, least_class(labels))
        folds = StratifiedKFold(members, shuffle=True, random_state=self.seed)
        self.best_score_ = -np.inf
        for kind in self.kinds:
            connectivity = ConnectivityMeasure(
                kind=kind, vectorize=True, discard_diagonal=self.discard_diagonal, standardize=False
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Maximum number of iterations")  # of tangent's reference
                vectors = connectivity.fit_transform(rows)
            scaler = StandardScaler()
            left, lengths, basis = np.linalg.svd(scaler.fit_transform(vectors), full_matrices=False)
            search = GridSearchCV(clone(self.classifier), {"C": list(PENALTIES)}, scoring="roc_auc", cv=folds)
            search.fit(left * lengths, labels)
            if search.best_score_ > self.best_score_:
                self.best_score_ = float(search.best_score_)
                self.connectivity_ = connectivity
                self.weights_ = search.best_estimator_.coef_[0] @ basis / scaler.scale_
                self.bias_ = float(search.best_estimator_.intercept_[0] - self.weights_ @ scaler.mean_)
                self.best_params_: dict[str, Any] = {"kind": kind} | search.best_params_
        return self

    def decision_function(self, rows: Sequence[NDArray]) -> NDArray[np.float64]:
        """Signed score of each participant's courses (T, regions), above 0 for a case: (n,)."""
        vectors = self.connectivity_.transform([*rows, rows[0]])[: len(rows)]  # it refuses one participant alone
        return vectors @ self.weights_ + self.bias_
