"""Connectivity and a linear model: one row per participant, tuned inside the training set."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
from nilearn.connectome import ConnectivityMeasure
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

from bundle.errors import InputError
from bundle.heads.combat import Combat, kept_of, parted

KINDS = ("correlation", "tangent")


def inner_folds(labels: NDArray, model: BaseEstimator, seed: int, most: int = 5) -> KFold | StratifiedKFold:
    """Folds of the training set: by class for a classifier, and fewer where a class has fewer members.

    Raises:
        InputError: a class has fewer than two members, or there are fewer than four participants.
    """
    if not is_classifier(model):
        if len(labels) < 4:
            raise InputError(f"the training set holds {len(labels)} participants, too few to learn from; split anew")
        return KFold(min(most, len(labels) // 2), shuffle=True, random_state=seed)
    return StratifiedKFold(min(most, least_class(labels)), shuffle=True, random_state=seed)


def least_class(labels: NDArray) -> int:
    """Members of the smallest class.

    Raises:
        InputError: it has fewer than two, or is the only one.
    """
    numbers, counts = np.unique(np.asarray(labels, int), return_counts=True)
    if len(numbers) < 2 or counts.min() < 2:
        held = ", ".join(f"{count} of class {number}" for number, count in zip(numbers, counts, strict=True))
        raise InputError(f"the training set holds {held}: too few to learn from; make other splits")
    return int(counts.min())


def shares_of(
    models: Sequence["ConnectivityModel"], usable: Sequence[bool] | NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each of some fitted models counts in the mean of them, by its skill.

    Args:
        models: of the same labels.
        usable: which may be in the mean; one at least.

    Returns:
        Shares (m,), whose sum is 1; where no usable model has any skill, they are equal. And scales (m,) of the
        outputs' deviations from their `centre_`, with which a share of all that is said is a model's own: the mean is
        the sum of `scale * (output - centre_) + share * centre_`.
    """
    skills = np.maximum([model.skill_ for model in models], 0) * usable
    skills = skills if skills.any() else np.array(usable, float)
    shares, spreads = skills / skills.sum(), np.array([model.spread_ for model in models])
    return shares, shares * (shares @ spreads) / np.where(spreads > 0, spreads, 1)


class ConnectivityModel(BaseEstimator):
    """Connectivity, scaling and a linear model with an L2 penalty; kind and penalty are tuned in inner folds.

    Connectivity (the tangent space's reference too) and scaling see no label, and are fitted once to all rows that are
    given: the training participants. The model works in the span of these rows, n numbers per row instead of one
    per pair of regions. As an L2 penalty keeps its weights in that span, the result is the same; it is what makes
    hundreds of participants a matter of seconds.

    Args:
        model: linear, with an L2 penalty, such as `LogisticRegression`, `LinearSVC` or `Ridge`.
        penalties: name of its penalty's parameter, and the strengths to choose from.
        scoring: what chooses, a name of scikit-learn's.
        seed: of the inner folds.
        kinds: of connectivity to choose from, as in nilearn's `ConnectivityMeasure`.
        discard_diagonal: leave the variances out.
        harmonise: take effects of sites off the connectivity, see `Combat`. A row is then a pair of site and courses.
            It knows the labels of all rows that are given, also of those that an inner fold holds back; these folds
            choose a kind and a penalty, which are what may come out too hopeful.

    Attributes:
        connectivity_: the fitted `ConnectivityMeasure`.
        combat_: the fitted `Combat`, where it harmonises.
        weights_: (k, features) of connectivity as it is, or harmonised, scaling included.
        bias_: (k,), its constants.
        best_params_: the chosen kind and penalty.
        centre_: (k,), the mean output over the rows that it was fitted to.
        best_score_: their score in the inner folds.
        skill_: what of it is beyond chance, of classes an area under a curve of 0.5.
    """

    def __init__(
        self,
        model: BaseEstimator,
        penalties: Mapping[str, Sequence[float]],
        scoring: str,
        seed: int = 0,
        kinds: Sequence[str] = KINDS,
        discard_diagonal: bool = True,
        harmonise: bool = False,
    ) -> None:
        self.model = model
        self.penalties = penalties
        self.scoring = scoring
        self.seed = seed
        self.kinds = kinds
        self.discard_diagonal = discard_diagonal
        self.harmonise = harmonise

    def fit(self, rows: Sequence[Any], labels: NDArray) -> Self:
        """Fit to courses (T, regions) of each participant, and numbers of their classes, or their values, (n,).

        Raises:
            InputError: there are too few participants, see `inner_folds`, or see `Combat.fit`.
        """
        sites, courses = parted(rows) if self.harmonise else ([], rows)
        folds = inner_folds(labels, self.model, self.seed)
        self.best_score_ = -np.inf
        for kind in self.kinds:
            connectivity = ConnectivityMeasure(
                kind=kind, vectorize=True, discard_diagonal=self.discard_diagonal, standardize=False
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Maximum number of iterations")  # of tangent's reference
                vectors = connectivity.fit_transform(courses)
            if self.harmonise:
                combat = Combat().fit(vectors, sites, kept_of(labels, is_classifier(self.model)))
                vectors = combat.transform(vectors, sites)
            scaler = StandardScaler()
            left, lengths, basis = np.linalg.svd(scaler.fit_transform(vectors), full_matrices=False)
            search = GridSearchCV(clone(self.model), dict(self.penalties), scoring=self.scoring, cv=folds)
            search.fit(left * lengths, labels)
            if search.best_score_ > self.best_score_:
                self.best_score_ = float(search.best_score_)
                self.connectivity_ = connectivity
                self.combat_ = combat if self.harmonise else None
                self.weights_ = np.atleast_2d(search.best_estimator_.coef_) @ basis / scaler.scale_
                self.bias_ = np.atleast_1d(search.best_estimator_.intercept_) - self.weights_ @ scaler.mean_
                self.best_params_: dict[str, Any] = {"kind": kind} | search.best_params_
                best, projected = search.best_estimator_, left * lengths
        classes = is_classifier(self.model)
        self.skill_ = self.best_score_ - 0.5 * classes
        self.centre_ = np.atleast_1d(best.intercept_)  # scaled rows have mean 0
        method = "decision_function" if classes else "predict"
        self._held_back = partial(cross_val_predict, best, projected, labels, cv=folds, method=method)
        return self

    @property
    def spread_(self) -> float:
        """SD of the outputs in the inner folds, of the rows held back: fits anew in each, for whoever asks."""
        return float(np.sqrt(self._held_back().var(axis=0).mean()))

    def decision_function(self, rows: Sequence[Any]) -> NDArray[np.float64]:
        """Outputs of each participant's courses (T, regions): (n, k); of two classes one, above 0 for the second.

        Raises:
            InputError: see `Combat.transform`.
        """
        sites, courses = parted(rows) if self.harmonise else ([], rows)
        vectors = self.connectivity_.transform([*courses, courses[0]])[:-1]  # it refuses one participant alone
        if self.combat_ is not None:
            vectors = self.combat_.transform(vectors, sites)
        return vectors @ self.weights_.T + self.bias_
