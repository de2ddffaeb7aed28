"""Whether redundancy dropout helps: small pretrainings with and without it, on a prepared cohort at 4 mm."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor
from torch.nn import functional

from bundle.anatomy.atlas import REGIONS
from bundle.data.clips import split_clips
from bundle.data.normalisation import Normalisation
from bundle.data.transforms import ReadClipd, ScatterClipd, TimeLastd
from bundle.masking.transforms import AAL3ROIMaskd, RegionAndTubesMaskd
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.preparation.transforms import Item
from bundle.training.losses import masked_mse
from bundle.training.metrics import TemporalR2
from scripts.benchmarks.measure import machine, markdown

EVERY = 2  # voxels along each axis that become one: 4 mm, and an eighth of the work
NETWORK: dict[str, Any] = {"image_size": (48, 48, 48), "frames": 8, "embed_dim": 12, "depths": (1, 1, 1)}


def redundancy_effect(
    store: str,
    rates: Sequence[float] = (0.0, 0.1, 0.3),
    seeds: int = 3,
    steps: int = 1000,
    batch: int = 2,
    learning_rate: float = 1e-3,
) -> str:
    """Pretrain a small network at each rate from each seed, and rebuild whole regions of the validation subjects.

    Masks are those of `configs/masks/region_tubes.json`. Each region in turn is then hidden at all frames.

    Args:
        store: a prepared store with its split file, e.g. of a cohort that `python -m scripts synthesize` made.
        rates: of redundancy dropout; differences are from the first.
        seeds: of weights, clips, masks and dropout: 0, 1, ...
        steps: of each pretraining.
        batch: clips of a step.
        learning_rate: of AdamW.
    """
    train, validation = (_clips(Path(store), subset) for subset in ("train", "validation"))
    found = np.array([[_score(rate, seed, train, validation, steps, batch, learning_rate) for seed in range(seeds)]
                      for rate in rates])  # fmt: skip
    rows = []
    for rate, scores in zip(rates, found, strict=True):
        better = scores - found[0]
        text = "" if rate == rates[0] else f"{better.mean():+.4f} ({better.min():+.4f} to {better.max():+.4f})"
        rows.append([f"{rate:g}", f"{scores.mean():.4f}", ", ".join(f"{score:.4f}" for score in scores), text])
    header = ["rate", "temporal R², mean", "of each seed", f"minus that of rate {rates[0]:g}, same seed: mean (range)"]
    facts = f"{len(train)} clips to train on, {len(validation)} to validate, {steps} steps of {batch} clips.\n\n"
    return f"{machine()}\n{facts}{markdown(header, rows)}"


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


def _score(
    rate: float,
    seed: int,
    train: list[Item],
    validation: list[Item],
    steps: int,
    batch: int,
    learning_rate: float,
) -> float:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = MaskedAutoencoder(**NETWORK, redundancy_dropout=rate)
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=learning_rate)
    mask = RegionAndTubesMaskd("image", list(REGIONS), seed=seed)
    for _ in range(steps):
        items = [mask(train[index]) for index in rng.integers(len(train), size=batch)]
        image, hidden = (torch.stack([item[name].as_tensor() for item in items]) for name in ("image", "mask"))
        optimizer.zero_grad()
        masked_mse(network(image, hidden), image, hidden).backward()
        optimizer.step()
    metric = TemporalR2()
    for image, hidden in _regions(validation):
        with torch.no_grad():
            metric.update((network.eval()(image, hidden), {"image": image, "mask": hidden}))
    return metric.compute()


def _regions(clips: list[Item]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every clip with every region hidden in turn, (1, 1, X, Y, Z, T) and (1, 1, X, Y, Z)."""
    for region in REGIONS:
        mask = AAL3ROIMaskd("image", region)
        for clip in clips:
            yield clip["image"].as_tensor()[None], mask(clip)["mask"].as_tensor()[None]
