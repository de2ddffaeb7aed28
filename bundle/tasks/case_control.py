"""Case or control: one logit per clip, averaged per subject, and scored once over subjects."""

from collections.abc import Sequence

import ignite.distributed as idist
import numpy as np
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics.metric import reinit__is_reduced
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from bundle.data.engine_output import EngineMetric
from bundle.errors import InputError


class SubjectScores(EngineMetric):
    """Scores over subjects: the logits of a subject's clips are averaged to one, then scored once over all.

    `compute` returns `{"auroc", "balanced_accuracy", "accuracy"}` (the two accuracies at probability 0.5);
    `scores["auroc"]` is a metric of its own. AUROC and balanced accuracy are NaN while one class is absent.
    After `compute`, `subjects` holds one row per subject: `participant_id`, `label`, `logit`, `clips`.
    """

    subjects: list[dict]

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._clips: list[tuple[str, float, float]] = []
        self.subjects = []

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: logits `(B, 1)` and its `{"label": (B, 1), "participant_id": B names}`."""
        logits, target = output
        self._clips += zip(
            target["participant_id"],
            target["label"].flatten().tolist(),
            logits.detach().float().flatten().tolist(),
            strict=True,
        )

    def compute(self) -> dict[str, float]:
        """Average per subject over all ranks, then score."""
        clips = self._clips
        if idist.get_world_size() > 1:
            gathered: list[Sequence] = [[] for _ in range(idist.get_world_size())]
            torch.distributed.all_gather_object(gathered, clips)
            clips = [clip for rank in gathered for clip in rank]
        if not clips:
            raise NotComputableError("SubjectScores needs at least one batch")
        self.subjects = average_per_subject(clips)
        return subject_scores(
            np.array([row["label"] for row in self.subjects]),
            np.array([row["logit"] for row in self.subjects]),
        )


def average_per_subject(clips: Sequence[tuple[str, float, float]]) -> list[dict]:
    """Average the logits of each subject's clips; `clips` are (participant_id, label, logit)."""
    logits: dict[str, list[float]] = {}
    labels: dict[str, int] = {}
    for participant, label, logit in clips:
        logits.setdefault(participant, []).append(logit)
        labels[participant] = int(label)
    return [
        {"participant_id": p, "label": labels[p], "logit": float(np.mean(logits[p])), "clips": len(logits[p])}
        for p in sorted(logits)
    ]


def subject_scores(labels: np.ndarray, logits: np.ndarray, threshold: float = 0.0) -> dict[str, float]:
    """AUROC, balanced accuracy and accuracy of one logit per subject; cases are above the threshold (a logit)."""
    predicted = (logits > threshold).astype(int)
    both = len(np.unique(labels)) == 2
    return {
        "auroc": float(roc_auc_score(labels, logits)) if both else float("nan"),
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)) if both else float("nan"),
        "accuracy": float(accuracy_score(labels, predicted)),
    }


class CaseControlLoss(nn.Module):
    """Binary cross-entropy of one logit per clip; `target["label"]` is 1 for cases and 0 for controls."""

    def forward(self, logit: Tensor, target: dict[str, torch.Tensor]) -> Tensor:
        """Return the scalar loss of `logit` `(B, 1)`."""
        return binary_cross_entropy_with_logits(logit.float(), target["label"].float())


def youden_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    """Logit above which a subject is called a case, with the largest sensitivity + specificity.

    The threshold lies midway between the two neighbouring scores, so that it is not tied to one subject's.

    Args:
        labels: 1 case, 0 control, (n,).
        logits: (n,).

    Raises:
        InputError: one class is absent.
    """
    if len(np.unique(labels)) < 2:
        only = "cases" if labels.any() else "controls"
        raise InputError(f"the validation set holds only {only}, so no threshold can be chosen; make other splits")
    false_positives, true_positives, thresholds = roc_curve(labels, logits, drop_intermediate=False)
    best = int(np.argmax(true_positives - false_positives))
    if not np.isfinite(thresholds[best]):  # "call nobody a case" is the best that can be done
        return float(logits.max())
    below = logits[logits < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if below.size else float(thresholds[best] - 1e-6)
