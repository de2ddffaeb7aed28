"""A readout that learns which tokens of a run to look at."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bundle.heads.on_encoder import OnEncoder


class AttentionClassifier(OnEncoder):
    """Score whole runs: a weighted mean of the encoder's tokens over space, time and clips, then one linear layer.

    Tokens are standardised as in `bundle.heads.mean.Classifier`. Their weights are a softmax, over all tokens of all
    clips of a run, of their products with a learnt query: an attentive probe (e.g. El-Nouby et al. 2024, arXiv
    2401.08541) reduced to what few subjects can teach. A query of zeros gives the plain mean.

    Args:
        freeze: keep the encoder as it is: no gradients, always in evaluation mode.
        outputs: numbers per run, see `bundle.tasks.task.Task`.
        queries: how many weighted means there are, each with a query of its own.
        **encoder: the arguments of `SwinMambaEncoder`.
    """

    def __init__(self, freeze: bool = True, outputs: int = 1, queries: int = 1, **encoder: Any) -> None:
        super().__init__(freeze, outputs, **encoder)
        channels = self.encoder.channels
        self.queries = nn.Parameter(torch.zeros(queries, channels))
        self.head = nn.Linear(queries * channels, outputs)

    def features(self, image: Tensor) -> Tensor:
        """Map clips (C, 1, X, Y, Z, T) to their tokens (C, tokens, c)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return self.encoder(image).flatten(2).mT

    def forward(self, image: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Score whole runs.

        Args:
            image: clips (C, 1, X, Y, Z, T), or their `features` (C, tokens, c), one run after another.
            counts: clips of each run; None: all are of one run.

        Returns:
            Outputs (n, k), of each run.
        """
        features = image if image.ndim == 3 else self.features(image)
        return self.head(self.seen(features, [features.shape[0]] if counts is None else counts))

    def seen(self, features: Tensor, counts: Sequence[int]) -> Tensor:
        """The weighted means (n, queries * c) of runs' `features` (C, tokens, c), so many clips each."""
        tokens = self.norm(features.flatten(0, 1)).view_as(features)
        scale = tokens.shape[-1] ** -0.5
        means = []
        for run in tokens.split(list(counts)):
            values = run.flatten(0, 1)  # (clips * tokens, c)
            weights = (values @ self.queries.T * scale).softmax(0)  # (clips * tokens, queries)
            means.append((weights.T.to(values.dtype) @ values).flatten())
        return torch.stack(means)
