"""What ways of pretraining cost: augmentation of all frames at once, and redundancy dropout."""

import time
from collections.abc import Callable
from functools import partial

import torch
from monai.data import MetaTensor
from monai.transforms import RandAffine, RandGaussianNoise
from torch import Tensor

from bundle.anatomy import grid
from bundle.data.augmentation import AugmentClipd
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.preparation.transforms import Item
from scripts.benchmarks.cases import FULL, QUICK, brain_like, training_step
from scripts.benchmarks.measure import Measurement, machine, markdown, seconds_text

MOVING = {"rotate": 3.0, "translate": 4.0, "scale": 0.05}


def augmentation(quick: bool = False, repeats: int = 7, device: str = "cpu") -> str:
    """Time a clip's augmentation for all frames at once, and in a loop over frames with MONAI's transforms.

    Args:
        quick: 24^3 voxels and 4 frames instead of 96^3 and 20.
        repeats: timed runs of each.
        device: "cpu" or "cuda".
    """
    facts = machine(device)
    size, frames = ((24, 24, 24), 4) if quick else (grid.SHAPE, 20)
    brain = brain_like(size).to(device)
    image = torch.zeros(frames, *size, device=device)
    image[:, brain] = torch.randn(frames, int(brain.sum()), device=device)
    affine = torch.as_tensor(grid.AFFINE)
    item: Item = {"image": MetaTensor(image, affine=affine), "brain": MetaTensor(brain[None], affine=affine)}
    move = AugmentClipd(**MOVING, device=device, seed=0).move
    noise = RandGaussianNoise(prob=1, std=0.1)
    rows = []
    for name, together, one_by_one in (
        ("affine", partial(move, item["image"]), partial(_loop, item["image"], [move])),
        (
            "affine, intensity and noise",
            partial(AugmentClipd(**MOVING, intensity=0.1, noise=0.1, device=device, seed=0), item),
            partial(_loop, item["image"], [move, noise]),
        ),
    ):
        found = side_by_side([together, one_by_one], repeats, device)
        rows.append([name, *(seconds_text(each.median) for each in found), ratio(found[::-1])])
    header = ["one clip", "all frames at once", "a loop over frames", "loop / at once, median (and quartiles)"]
    return facts + "\n\n" + markdown(header, rows)


def _loop(image: MetaTensor, transforms: list[Callable]) -> Tensor:
    """Each frame by itself, with the same affine, as published code does it."""
    frames = []
    for frame in image:
        frame = frame[None]
        for transform in transforms:
            if isinstance(transform, RandAffine):
                transform.set_random_state(0)
            frame = transform(frame)
        frames.append(frame)
    return torch.cat(frames)


def redundancy(quick: bool = False, repeats: int = 7, device: str = "cpu", rate: float = 0.1) -> str:
    """Time a training step with and without redundancy dropout, in turn.

    Args:
        quick: a tiny network.
        repeats: timed steps of each.
        device: "cpu" or "cuda".
        rate: share of the tokens that is dropped.
    """
    facts = machine(device)
    size = QUICK if quick else FULL
    steps = [
        training_step(MaskedAutoencoder(**size, redundancy_dropout=dropped), device=device) for dropped in (0.0, rate)
    ]
    found = side_by_side(steps, repeats, device)
    header = ["MAE training step", "without", f"rate {rate}", "with / without, median (and quartiles)"]
    row = ["batch 1", *(seconds_text(each.median) for each in found), ratio(found[::-1])]
    return facts + "\n\n" + markdown(header, [row])


def side_by_side(runs: list[Callable], repeats: int, device: str) -> list[Measurement]:
    """Time functions in turn, so that what else the machine does falls on all; on a CPU, the process's own time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    for run in runs:
        run()
    rounds = [[_seconds(run, clock, device) for run in runs] for _ in range(repeats)]
    return [Measurement(column, 0) for column in zip(*rounds, strict=True)]


def _seconds(run: Callable, clock: Callable[[], float], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def ratio(found: list[Measurement]) -> str:
    """Median and quartiles of the ratios of two functions' times, round by round."""
    ratios = torch.tensor([a / b for a, b in zip(found[0].seconds, found[1].seconds, strict=True)])
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
