"""A ridge regression that rebuilds hidden labels from the other labels' means: what a network's temporal R² is beside.

It is linear, has no delay in time, and sees a label's mean only; within that it is the best there is.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from bundle.anatomy.atlas import AAL3, load_atlas
from bundle.anatomy.parcels import parcel_index, parcels_of
from bundle.errors import InputError

logger = logging.getLogger(__name__)

PENALTIES = tuple(10.0**k for k in range(-4, 5))
"""To choose from: times the mean variance of the labels' means."""
HELD_OUT = 5
"""The last clip in so many, run after run, chooses the penalty."""


class RidgeFromMeans(nn.Module):
    """Rebuild the voxels of hidden labels, frame by frame, from the means of the labels that are seen whole.

    It is called like a `MaskedAutoencoder`. All values are deviations from the clip's mean, so that its prediction has
    no mean of its own: only its temporal R² says something.

    Args:
        clips: dataset of the training clips, as `ReadClipd` gives them.
        transforms: to `image` (channels, X, Y, Z, T), of which the last channel is used.
        atlas: see `bundle.anatomy.atlas.load_atlas`.

    Raises:
        InputError: there are too few clips to hold some out.
    """

    def __init__(
        self, clips: Sequence[dict[str, Any]], transforms: Sequence[Callable], atlas: str | Path = AAL3
    ) -> None:
        super().__init__()
        if len(clips) < HELD_OUT:
            raise InputError(f"ridge regression needs at least {HELD_OUT} training clips, not {len(clips)}")
        loaded, prepare = load_atlas(atlas), Compose(transforms)
        self.labels = parcel_index(loaded, parcels_of(loaded, "label"))  # (X, Y, Z), 1 to n
        self.voxels = np.flatnonzero(self.labels)
        self.of_voxel = self.labels.ravel()[self.voxels]  # (V,)
        self.counts = np.bincount(self.of_voxel)  # voxels of each label, 0 for none; (n + 1,)
        size = int(self.labels.max())
        shapes = ((size, size), (size, len(self.voxels)), (len(self.voxels),))
        # over the clips that fit, and those held out: products of the means, of means and voxels, squares of voxels
        self.sums = [tuple(np.zeros(shape) for shape in shapes) for _ in ("fit", "held out")]
        for position in tqdm(range(len(clips)), desc="ridge", unit="clip"):
            item = prepare(clips[position])
            means, courses = self._courses(item["image"].as_tensor()[-1])
            held_out = position % HELD_OUT == HELD_OUT - 1
            for total, part in zip(
                self.sums[held_out], (means @ means.T, means @ courses.T, (courses**2).sum(1)), strict=True
            ):
                total += part
        self.solved: dict[bytes, NDArray[np.float64]] = {}

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Rebuild the hidden voxels of a clip.

        Args:
            image: (1, channels, X, Y, Z, T).
            mask: (1, 1, X, Y, Z), true for hidden; a label is hidden whole or not at all.

        Returns:
            (1, 1, X, Y, Z, T): deviations from the clip's mean in hidden labels, 0 elsewhere.

        Raises:
            InputError: the mask hides a part of a label.
        """
        inside = mask[0, 0].cpu().numpy()
        counts = np.bincount(self.labels[inside], minlength=len(self.counts))
        counts[0] = 0
        hidden = counts > 0
        if np.any(counts[hidden] < self.counts[hidden]):
            raise InputError("ridge regression rebuilds whole labels; take a mask of regions, without tubes or shares")
        means, _ = self._courses(image[0, -1])
        seen, wanted = ~hidden[1:], hidden[self.of_voxel]
        weights = self._weights(seen, wanted)
        rebuilt = np.zeros((self.labels.size, image.shape[-1]), np.float32)
        rebuilt[self.voxels[wanted]] = weights.T @ means[seen]
        return torch.from_numpy(rebuilt).reshape(1, 1, *self.labels.shape, -1).to(image.device)

    def _courses(self, image: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Labels' mean courses (n, T), and the voxels' courses (V, T), around the clip's mean."""
        courses = image.double().cpu().numpy().reshape(-1, image.shape[-1])[self.voxels]
        courses -= courses.mean(1, keepdims=True)
        sums = np.stack([np.bincount(self.of_voxel, frame) for frame in courses.T], axis=1)
        return (sums / np.maximum(self.counts, 1)[:, None])[1:], courses

    def _weights(self, seen: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Weights (seen labels, wanted voxels), with the penalty that rebuilds the clips held out best."""
        key = seen.tobytes()
        if key not in self.solved:
            rows, cells = np.ix_(seen, seen), np.ix_(seen, wanted)
            (a, c, _), (b, d, squares) = [(means[rows], both[cells], own[wanted]) for means, both, own in self.sums]
            unit = np.trace(a) / len(a)
            best = -np.inf
            for penalty in PENALTIES:
                weights = np.linalg.solve(a + penalty * unit * np.eye(len(a)), c)
                explained = 2 * (weights * d).sum() - (weights * (b @ weights)).sum()
                if explained > best:
                    best, chosen = explained, penalty
            whole = a + b
            weights = np.linalg.solve(whole + chosen * np.trace(whole) / len(whole) * np.eye(len(whole)), c + d)
            logger.info(
                "ridge: %d labels from %d others, penalty %g, held-out R² %.3f",
                (~seen).sum(), seen.sum(), chosen, best / squares.sum(),
            )  # fmt: skip
            self.solved[key] = weights
        return self.solved[key]
