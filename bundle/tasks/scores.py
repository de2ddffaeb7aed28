"""The metric of every task: one score per subject, averaged over its clips, and measured once over subjects."""

from collections.abc import Iterable, Sequence

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import MetricsLambda
from ignite.metrics.metric import reinit__is_reduced
from torch import Tensor

from bundle.data.engine_output import EngineMetric
from bundle.tasks.task import Results, Task

Clip = tuple[str, float, list[float]]
"""Participant, label and the network's outputs."""


class SubjectScores(EngineMetric):
    """Measures over subjects: the outputs of a subject's clips are averaged to one, then measured once over all.

    `compute` returns the task's measures by name, at threshold 0; `scores["auroc"]` is a metric of its own. A measure
    is NaN while the classes that it compares are absent. After `compute`, `subjects` has one row per subject:
    `participant_id`, `label`, the task's columns, and `clips`, their number.

    Args:
        task: what is predicted.
    """

    subjects: pd.DataFrame

    def __init__(self, task: Task) -> None:
        self.task = task
        super().__init__()

    def named(self, prefix: str, which: slice) -> dict[str, MetricsLambda]:
        """Some of the measures as metrics of their own, such as `val_auroc`."""
        return {f"{prefix}{name}": self[name] for name in self.task.metrics[which]}

    @reinit__is_reduced
    def reset(self) -> None:
        """Start a new epoch."""
        self._clips: list[Clip] = []
        self.subjects = pd.DataFrame()

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, dict]) -> None:
        """Add a batch: outputs `(B, k)` and its `{"label": (B, 1), "participant_id": B names}`."""
        outputs, target = output
        self._clips += zip(
            target["participant_id"],
            target["label"].flatten().tolist(),
            outputs.detach().float().cpu().tolist(),
            strict=True,
        )

    def compute(self) -> dict[str, float]:
        """Average per subject over all ranks, then measure."""
        clips = self._clips
        if idist.get_world_size() > 1:
            gathered: list[Sequence] = [[] for _ in range(idist.get_world_size())]
            torch.distributed.all_gather_object(gathered, clips)
            clips = [clip for rank in gathered for clip in rank]
        if not clips:
            raise NotComputableError("SubjectScores needs at least one batch")
        self.subjects = average_per_subject(clips, self.task)
        return measure(self.task, once_tested(self.subjects, self.task))


def average_per_subject(clips: Sequence[Clip], task: Task) -> pd.DataFrame:
    """Average the outputs of each subject's clips: `participant_id`, `label`, the task's columns and `clips`."""
    table = mean_outputs([(participant, output) for participant, _, output in clips], task)
    labels = {participant: label for participant, label, _ in clips}
    table.insert(1, "label", table["participant_id"].map(labels))
    return table


def mean_outputs(clips: Iterable[tuple[str, list[float]]], task: Task) -> pd.DataFrame:
    """Average outputs by participant, in units: `participant_id`, sorted, the task's columns, and `clips`, how many."""
    outputs: dict[str, list[list[float]]] = {}
    for participant, output in clips:
        outputs.setdefault(participant, []).append(output)
    names = sorted(outputs)
    means = task.in_units(np.array([np.mean(outputs[name], axis=0) for name in names]))
    table = pd.DataFrame({"participant_id": names})
    table[list(task.columns)] = means
    return table.assign(clips=[len(outputs[name]) for name in names])


def once_tested(subjects: pd.DataFrame, task: Task, threshold: float = 0.0, groups: Sequence[str] = ()) -> Results:
    """Test results of one network: rows with `label` and the task's columns; `groups` are ranked apart."""
    count = len(subjects)
    return Results(
        labels=subjects["label"].to_numpy(float),
        outputs=subjects[list(task.columns)].to_numpy(float)[:, None],
        groups=np.array(list(groups) or [""] * count, dtype=str),
        thresholds=np.full((count, 1), threshold),
    )


def measure(task: Task, tested: Results) -> dict[str, float]:
    """The task's measures by name."""
    values = task.measures(tested)(np.ones(len(tested.labels)))
    return dict(zip(task.metrics, values.tolist(), strict=True))
