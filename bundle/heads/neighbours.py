"""Nearest neighbours: what features tell without any training."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bundle.errors import InputError
from bundle.heads.fitted import FittedHead, by_participant
from bundle.tasks.task import Task

TEMPERATURE = 0.07
FEWEST = 0.01
"""A share of votes below which a class's logit does not fall."""


class NearestNeighbours(FittedHead):
    """Score whole runs by the training participants that are most like them.

    A run is the mean of the encoder's tokens over space, time and clips; a training participant is the mean of their
    runs. In units standardised over these, the k nearest training participants by cosine vote for their class, or for
    their value, with weights exp(cosine / 0.07) (Wu et al. 2018, arXiv 1805.01978; used as the probe of self-supervised
    features by Caron et al. 2021, arXiv 2104.14294).

    Args:
        freeze: must be True.
        outputs: numbers per run, see `bundle.tasks.task.Task`.
        neighbours: k; fewer where there are fewer training participants.
        **encoder: the arguments of `SwinMambaEncoder`.

    Raises:
        InputError: `neighbours` is below 1.
    """

    def __init__(self, freeze: bool = True, outputs: int = 1, neighbours: int = 10, **encoder: Any) -> None:
        super().__init__(freeze, outputs, **encoder)
        if neighbours < 1:
            raise InputError(f"neighbours must be at least 1, not {neighbours}")
        self.neighbours = neighbours
        self.settings |= {"neighbours": neighbours}

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Map clips (C, 1, X, Y, Z, T) to the mean over their tokens, float32 (C, c)."""
        return self.encoder(image).float().mean(dim=(2, 3, 4, 5))

    def fit(
        self,
        runs: Sequence[Tensor],
        labels: Sequence[float],
        task: Task,
        seed: int = 0,
        participants: Sequence[Hashable] | None = None,
    ) -> None:
        """Keep the training participants: features (C, c) of each run's clips; nothing is drawn.

        Every participant has one vote, whatever the number of their runs.
        """
        means = by_participant((run.double().mean(0) for run in runs), participants)
        rows = torch.stack([torch.stack(own).mean(0) for own in means])
        spread = rows.std(0, correction=0)
        given = torch.as_tensor(task.scaled(np.array([own[-1] for own in by_participant(labels, participants)], float)))
        votes = functional.one_hot(given.long(), max(2, task.outputs)).double() if task.classes else given[:, None]
        self.fitted = {"mean": rows.mean(0), "spread": torch.where(spread > 0, spread, 1.0), "votes": votes}
        self.fitted["runs"] = self._standardised(rows)  # of a participant, their mean

    def forward(self, image: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Score whole runs.

        Args:
            image: clips (C, 1, X, Y, Z, T), or their `features` (C, c), one run after another.
            counts: clips of each run; None: all are of one run.

        Returns:
            Outputs (n, k) of each run, float32, without gradients: of two classes the log odds of the second's share of
            the votes, of more the logarithms of their shares, of a regression the weighted mean.

        Raises:
            InputError: it was not fitted.
        """
        self.require_fitted()
        features = image.detach() if image.ndim == 2 else self.features(image)
        counts = [len(features)] if counts is None else list(counts)
        rows = torch.stack([run.mean(0) for run in features.cpu().double().split(counts)])
        alike = self._standardised(rows) @ self.fitted["runs"].T
        nearest, who = alike.topk(min(self.neighbours, alike.shape[1]))
        weights = (nearest / TEMPERATURE).softmax(-1)  # (n, neighbours)
        shares = (weights[..., None] * self.fitted["votes"][who]).sum(1)  # (n, classes), or (n, 1)
        if shares.shape[1] == 1:
            outputs = shares
        elif self.outputs == 1:
            outputs = shares[:, 1:].clamp(FEWEST, 1 - FEWEST).logit()
        else:
            outputs = shares.clamp(min=FEWEST).log()
        return outputs.to(image.device, torch.float32)

    def _standardised(self, rows: Tensor) -> Tensor:
        """Rows (n, c) in SD of the training participants, of length 1."""
        return functional.normalize((rows - self.fitted["mean"]) / self.fitted["spread"], dim=-1)
