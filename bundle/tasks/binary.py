"""Two classes: one logit per subject for the second of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bundle.errors import InputError
from bundle.tasks.classes import OfClasses
from bundle.tasks.task import Floats, Measures, Results, auroc, independent_pairs, mean_of


class Binary(OfClasses):
    """The class above a threshold that is fixed on validation subjects.

    Measures: `auroc`; `auprc`, the average precision; `balanced_accuracy` and `accuracy` at the threshold; `brier`, the
    mean squared error of the probability, which is the sigmoid of the logit.
    """

    kind = "binary"
    metrics = ("auroc", "auprc", "balanced_accuracy", "accuracy", "brier")
    compared = ("auroc", "accuracy")
    within = "auroc"
    scoring = "roc_auc"
    drawn = "Calibration"
    separation = "Part of the difference between the two classes' mean logits"

    @property
    def chance(self) -> dict[str, float]:
        """What knows nothing scores."""
        return {"auroc": 0.5, "balanced_accuracy": 0.5}

    @property
    def columns(self) -> tuple[str, ...]:
        """The logit."""
        return ("logit",)

    def loss(self, prediction: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Binary cross-entropy of logits (b, 1)."""
        return binary_cross_entropy_with_logits(prediction.float(), target["label"].float())

    def threshold(self, labels: Floats, outputs: Floats) -> float:
        """See `youden_threshold`."""
        return youden_threshold(labels, outputs[:, 0])

    def decisions(self, outputs: Floats, threshold: float) -> dict[str, Floats]:
        """`probability` of the second class, and `predicted`, 1 above the threshold."""
        logits = outputs[:, 0]
        return {"probability": expit(logits), "predicted": (logits > threshold).astype(int)}

    def describe(self) -> dict[str, str]:
        """What the columns mean."""
        name = f"{self.column} {self.classes[1]}"
        return {
            "probability": f"of {name}, between 0 and 1: sigmoid of the logit divided by the temperature",
            "logit": f"log odds of {name} (against {self.classes[0]}), the mean over the participant's clips",
            "predicted": f"1 for {name}, 0 for {self.classes[0]}, at the threshold of the validation subjects",
        }

    def measures(self, tested: Results) -> Measures:
        """See the class."""
        positive = tested.labels == 1
        logits = tested.outputs[..., 0]
        right = self.right(tested)
        ranks = auroc(tested, logits, positive)
        precision = average_precision(tested, logits, positive)
        recalls = mean_of(right, positive), mean_of(right, ~positive)
        squared = mean_of(((expit(logits) - tested.labels[:, None]) ** 2).mean(1))
        overall = mean_of(right)

        def measured(counts: Floats) -> Floats:
            balanced = (recalls[0](counts) + recalls[1](counts)) / 2
            return np.stack([ranks(counts), precision(counts), balanced, overall(counts), squared(counts)], axis=-1)

        return measured

    def right(self, tested: Results) -> Floats:
        """Share of seeds that are right about each subject, (n,)."""
        return ((tested.outputs[..., 0] > tested.thresholds) == (tested.labels[:, None] == 1)).mean(1)

    def rankings(self, tested: Results) -> list[tuple[Floats, NDArray[np.bool_]]]:
        """The logits."""
        return [(tested.outputs[..., 0], tested.labels == 1)]

    def trials(self, tested: Results) -> dict[str, int]:
        """Disjoint pairs for what ranks, and the smaller class for what counts."""
        positive = tested.labels == 1
        pairs, fewer = independent_pairs(tested, positive), int(min(positive.sum(), (~positive).sum()))
        return {"auroc": pairs, "auprc": pairs, "balanced_accuracy": fewer, "accuracy": fewer}

    def reference(self, labels: Floats) -> dict[str, float]:
        """The accuracy of always giving the more frequent answer."""
        return {"majority_accuracy": float(max(labels.mean(), 1 - labels.mean()))}

    def draw(self, axes: Any, tested: Results) -> None:
        """Calibration: how often the second class is seen where its probability is said to be so and so."""
        probability = expit(tested.outputs[..., 0]).ravel()
        truth = np.repeat(tested.labels, tested.outputs.shape[1])
        bins = int(np.clip(len(tested.labels) // 8, 2, 10))
        seen, said = calibration_curve(truth, probability, n_bins=bins, strategy="quantile")
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
        axes.plot(said, seen, marker="o", color="#225588")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"probability of {self.classes[1]}", ylabel="share seen")
        axes.set_title(f"Calibration, {len(tested.labels)} subjects in {len(seen)} bins")

    def predict(self, model: BaseEstimator, rows: Any) -> Floats:
        """The distance to the boundary, or the log odds."""
        if hasattr(model, "decision_function"):
            return np.asarray(model.decision_function(rows), float).reshape(-1, 1)
        log = model.predict_log_proba(rows)  # (n, 2)
        return (log[:, 1] - log[:, 0])[:, None]


def average_precision(tested: Results, scores: Floats, positive: NDArray[np.bool_]) -> Measures:
    """Average precision, as scikit-learn's, as a function of how often each subject counts.

    Taken within each group and averaged over them by their positives, then over the seeds.
    """
    parts = []
    for name in np.unique(tested.groups):
        members = np.flatnonzero(tested.groups == name)
        for own in scores[members].T:
            order = np.argsort(-own, kind="stable")
            last = np.append(np.diff(own[order]) != 0, True)  # of each tie
            parts.append((members[order], positive[members[order]].astype(float), last))

    def measured(counts: Floats) -> Floats:
        total, weight = np.zeros(counts.shape[:-1]), np.zeros(counts.shape[:-1])
        with np.errstate(invalid="ignore", divide="ignore"):
            for order, hits, last in parts:
                found = np.cumsum(counts[..., order] * hits, axis=-1)[..., last]
                called = np.cumsum(counts[..., order], axis=-1)[..., last]
                gained = np.diff(found, axis=-1, prepend=0)
                positives = found[..., -1]
                total += np.where(gained > 0, gained * found / called, 0).sum(-1)
                weight += positives
            return total / weight

    return measured


def youden_threshold(labels: Floats, logits: Floats) -> float:
    """Logit above which a subject is given the second class, with the largest sensitivity + specificity.

    The threshold lies midway between the two neighbouring scores, so that it is not tied to one subject's.

    Args:
        labels: 0 or 1, (n,).
        logits: (n,).

    Raises:
        InputError: one class is absent.
    """
    if len(np.unique(labels)) < 2:
        only = "second" if labels.any() else "first"
        raise InputError(f"the validation set holds only the {only} class, so no threshold can be chosen; split anew")
    false_positives, true_positives, thresholds = roc_curve(labels, logits, drop_intermediate=False)
    best = int(np.argmax(true_positives - false_positives))
    if not np.isfinite(thresholds[best]):  # to give nobody the second class is the best that can be done
        return float(logits.max())
    below = logits[logits < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if below.size else float(thresholds[best] - 1e-6)
