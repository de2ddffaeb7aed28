"""Whether redundancy dropout helps: small pretrainings with and without it, on a prepared cohort at 4 mm."""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional

from bundle.anatomy.atlas import REGIONS
from bundle.data.clips import split_clips
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.masking.transforms import AAL3ROIMaskd, RandomTokenMaskd
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.preparation.transforms import Item
from bundle.training.losses import masked_mse
from bundle.training.metrics import TemporalR2
from scripts.benchmarks.measure import machine, markdown

logger = logging.getLogger(__name__)

EVERY = 2  # voxels along each axis that become one: 4 mm, and an eighth of the work
NETWORK: dict[str, Any] = {"image_size": (48, 48, 48), "frames": 8, "embed_dim": 12, "depths": (1, 1, 1)}
TUBES = 0.3  # share of the brain's tokens that is hidden, at all frames
MEASURES = ("tubes", "regions")


def redundancy_effect(
    store: str,
    rates: Sequence[float] = (0.0, 0.1),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 800,
    learning_rate: float = 2e-3,
) -> str:
    """Pretrain a small network at each rate from each seed, and rebuild what is hidden of the validation subjects.

    Random tubes in the brain are hidden in training. In validation they are again, the same for all networks; and each
    region in turn, whole.

    Args:
        store: a prepared store with its split file, e.g. of a cohort that `python -m scripts synthesize` made.
        rates: of redundancy dropout; differences are from the first.
        seeds: of weights, clips, masks and dropout.
        steps: of each pretraining, one clip each.
        learning_rate: of AdamW.
    """
    facts = machine()
    train, validation = (_clips(Path(store), subset) for subset in ("train", "validation"))
    found = np.empty((len(rates), len(seeds), len(MEASURES)))
    for (number, seed), (row, rate) in product(enumerate(seeds), enumerate(rates)):
        found[row, number] = _scores(rate, seed, train, validation, steps, learning_rate)
        logger.warning("rate %g, seed %d: %s %s", rate, seed, MEASURES, found[row, number])
    rows = []
    for (row, rate), (column, measure) in product(enumerate(rates), enumerate(MEASURES)):
        scores = found[row, :, column]
        each = ", ".join(f"{score:.3f}" for score in scores)
        rows.append([f"{rate:g}", measure, f"{scores.mean():.3f}", each, difference(scores - found[0, :, column])])
    header = [
        "rate",
        "hidden",
        "temporal R²",
        "of each seed",
        f"minus rate {rates[0]:g}, seed by seed (95 %, Student's t)",
    ]
    counts = f"{len(train)} clips to train on, {len(validation)} to validate, {steps} steps of one clip."
    return f"{facts}\n{counts}\n\n{markdown(header, rows)}"


def difference(values: NDArray[np.float64]) -> str:
    """Mean of the seeds' differences, with Student's interval where there are several; nothing where all are 0."""
    if not values.any():
        return ""
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def _clips(store: Path, subset: str) -> list[Item]:
    """All clips of a set in memory, at 4 mm: "image" (1, X, Y, Z, T) and "brain"."""
    frames = NETWORK["frames"]
    read, last = ReadClipd(store, frames), TimeLastd()
    scatter = ScatterClipd(Normalisation("voxel", sd_floor=0.1, clip=5.0))
    listed = split_clips(
        store, store / "splits.json", subset, frames, stride=frames if subset == "train" else 3 * frames
    )
    return [last(_coarser(scatter(read(clip)))) for clip in listed]


def _coarser(item: Item) -> Item:
    """Means of blocks of voxels; a block is brain where half of it is."""
    for name in ("image", "brain"):
        affine = item[name].affine.clone()
        affine[:3, 3] += (EVERY - 1) / 2 * affine[:3, :3].sum(1)  # the first block's middle
        affine[:3, :3] *= EVERY
        pooled = functional.avg_pool3d(item[name].as_tensor().float(), EVERY)
        item[name] = MetaTensor(pooled >= 0.5 if name == "brain" else pooled, affine=affine)
    return item


def _scores(
    rate: float, seed: int, train: list[Item], validation: list[Item], steps: int, learning_rate: float
) -> list[float]:
    """Pretrain, and return the temporal R² of each of `MEASURES`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = MaskedAutoencoder(**NETWORK, redundancy_dropout=rate)
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=learning_rate)
    mask = RandomTokenMaskd("image", TUBES, tube=True, seed=seed)
    for _ in range(steps):
        image, hidden = _pair(train[rng.integers(len(train))], mask)
        optimizer.zero_grad()
        masked_mse(network(image, hidden), image, hidden).backward()
        optimizer.step()
    tubes = RandomTokenMaskd("image", TUBES, tube=True, fixed=True)
    return [
        _explained(network.eval(), (_pair(clip, mask) for mask in masks for clip in validation))
        for masks in ([tubes], [AAL3ROIMaskd("image", region) for region in REGIONS])
    ]


def _pair(clip: Item, mask: Callable[[Item], Item]) -> tuple[Tensor, Tensor]:
    """A clip (1, 1, X, Y, Z, T), and what is hidden of it, (1, 1, X, Y, Z)."""
    item = mask(clip)
    return item["image"].as_tensor()[None], item["mask"].as_tensor()[None]


@torch.no_grad()
def _explained(network: MaskedAutoencoder, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    metric = TemporalR2()
    for image, hidden in pairs:
        metric.update((network(image, hidden), {"image": image, "mask": hidden}))
    return metric.compute()
