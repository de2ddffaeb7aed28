"""Connectivity, scaling and a linear classifier: one row per participant, tuned inside the training set."""

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from nilearn.connectome import ConnectivityMeasure
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bundle.errors import InputError

PENALTIES = tuple(10.0**k for k in range(-4, 3))
KINDS = ("correlation", "tangent")


def connectivity_classifier(
    classifier: BaseEstimator,
    seed: int,
    inner_folds: int = 5,
    kinds: Sequence[str] = KINDS,
    discard_diagonal: bool = True,
) -> GridSearchCV:
    """Connectivity, scaling and a linear classifier; kind and penalty are tuned inside the training set.

    Rows are participants, so that no participant is on both sides of an inner fold. The tangent space's reference is
    fitted on the training rows of each inner fold too.
    """
    pipeline = make_pipeline(
        ConnectivityMeasure(kind=kinds[0], vectorize=True, discard_diagonal=discard_diagonal, standardize=False),
        StandardScaler(),
        classifier,
    )
    step = type(classifier).__name__.lower()
    choices = {"connectivitymeasure__kind": list(kinds), f"{step}__C": list(PENALTIES)}
    folds = StratifiedKFold(inner_folds, shuffle=True, random_state=seed)
    return GridSearchCV(pipeline, choices, scoring="roc_auc", cv=folds)


def fit_tuned(model: BaseEstimator, rows: Any, labels: NDArray) -> None:
    """Fit, tuning in fewer inner folds where a class has fewer members than there are folds.

    Raises:
        InputError: the training set holds fewer than two cases or two controls.
    """
    controls, cases = np.bincount(labels, minlength=2)
    if min(cases, controls) < 2:
        raise InputError(
            f"the training set holds {cases} cases and {controls} controls, too few to learn from; make other splits"
        )
    with tempfile.TemporaryDirectory() as kept, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Maximum number of iterations")  # of a tangent space's reference
        warnings.filterwarnings("ignore", message="Persisting input arguments")  # joblib's, of time only
        if isinstance(model, GridSearchCV):
            model.set_params(estimator__memory=kept)  # connectivity is the same for every penalty
            model.cv.n_splits = min(model.cv.n_splits, cases, controls)
        model.fit(rows, labels)
