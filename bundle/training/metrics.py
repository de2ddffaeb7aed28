"""Ignite metrics: reconstruction of the hidden voxels, and subject-level classification scores."""

from collections.abc import Callable, Sequence

import ignite.distributed as idist
import numpy as np
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torch import Tensor

from bundle.training.losses import masked_squared_error


def prediction_and_target(output: dict) -> tuple[Tensor, dict]:
    """Pick what the metrics here need from the output of a MONAI engine that does not decollate."""
    return output["pred"], output["label"]


class EngineMetric(Metric):
    """A metric that reads the output of a MONAI engine by default."""

    def __init__(self, output_transform: Callable = prediction_and_target, device: str | torch.device = "cpu") -> None:
        super().__init__(output_transform=output_transform, device=device)


class MaskedMSE(EngineMetric):
    """Mean squared error over all masked voxels and frames of all clips, on all ranks."""

    _state_dict_all_req_keys = ("_squared", "_count")

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._squared = torch.zeros((), dtype=torch.float64)
        self._count = 0

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: prediction ``(B, 1, X, Y, Z, T)`` and its ``{"image", "mask"}``."""
        prediction, target = output
        squared, count = masked_squared_error(prediction.detach(), target["image"], target["mask"])
        self._squared += squared.double().cpu()
        self._count += count

    @sync_all_reduce("_squared", "_count")
    def compute(self) -> float:
        """Return the mean over everything added since `reset`."""
        if self._count == 0:
            raise NotComputableError("MaskedMSE needs at least one batch")
        return float(self._squared / self._count)


class TemporalR2(EngineMetric):
    """Share of the temporal variance of masked voxels that the reconstruction explains.

    Both signals are taken around their own mean over the clip, voxel by voxel, so that static anatomy, which
    dominates the squared error of globally z-scored BOLD, counts for nothing:
    ``1 - sum((y - mean(y)) - (p - mean(p)))^2 / sum(y - mean(y))^2``. 1 is perfect, 0 is a flat prediction,
    below 0 is worse than flat. Where a mask differs between frames, only its masked frames are summed.
    """

    _state_dict_all_req_keys = ("_residual", "_total")

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._residual = torch.zeros((), dtype=torch.float64)
        self._total = torch.zeros((), dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: prediction ``(B, 1, X, Y, Z, T)`` and its ``{"image", "mask"}``."""
        prediction, target = output
        mask = target["mask"]
        if mask.ndim == prediction.ndim - 1:
            mask = mask.unsqueeze(-1).expand_as(prediction)
        voxels = mask.any(dim=-1)  # (B, 1, X, Y, Z)
        y = _around_mean(target["image"][voxels])  # (B, 1, X, Y, Z, T) -> (V, T)
        p = _around_mean(prediction.detach()[voxels])
        hidden = mask[voxels]
        self._residual += (y - p)[hidden].square().sum().cpu()
        self._total += y[hidden].square().sum().cpu()

    @sync_all_reduce("_residual", "_total")
    def compute(self) -> float:
        """Return R^2 over everything added since `reset`; NaN if the hidden voxels never varied."""
        if float(self._total) == 0:
            return float("nan")
        return float(1 - self._residual / self._total)


def _around_mean(series: Tensor) -> Tensor:
    series = series.double()
    return series - series.mean(dim=-1, keepdim=True)


class SubjectScores(EngineMetric):
    """Scores over subjects: the logits of a subject's clips are averaged to one, then scored once over all.

    `compute` returns ``{"auroc", "balanced_accuracy", "accuracy"}`` (the two accuracies at probability 0.5);
    ``scores["auroc"]`` is a metric of its own. AUROC and balanced accuracy are NaN while one class is absent.
    After `compute`, ``subjects`` holds one row per subject: ``participant_id``, ``label``, ``logit``, ``clips``.
    """

    subjects: list[dict]

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._clips: list[tuple[str, float, float]] = []
        self.subjects = []

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: logits ``(B, 1)`` and its ``{"label": (B, 1), "participant_id": B names}``."""
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
    """Average the logits of each subject's clips; ``clips`` are (participant_id, label, logit)."""
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
