"""Spatiotemporal redundancy dropout (STRD) of NeuroSTORM (Wang et al. 2025, arXiv 2506.11167), for Mamba's windows.

A token is redundant when tokens beside it in space, or before and after it in time, are much like it. Dropping such
tokens while a network is trained shall make it look further away. With A the attention between the tokens of a window,
and the neighbours `N_s(i)` of token i in space (same frame) and `N_t(i)` in time (same place), the paper defines
(equations 1 to 3, as the authors' code numbers them; CUHK-AIM-Group/NeuroSTORM, commit 33df6fe)

    f_spat(i) = max of A_ij over j in N_s(i)                                                              (1)
    f_temp(i) = max of A_ij over j in N_t(i)                                                              (2)
    W_ij = (f_temp(i) A_ij / sum of A_ik over N_s(i) + f_spat(i) A_ij / sum of A_ik over N_t(i)) / 2      (3)

and drops the element A_ij with probability W_ij. DropMAE (Wu et al. 2023, arXiv 2304.00571) did this to videos before.

Mamba has no attention to drop elements of. As in the authors' code, A is the softmax of the products of Mamba's
outputs, and whole tokens are dropped: what Mamba adds to them is left out. The rest was chosen so:

- The redundancy of token i is the expected number of its dropped elements: the sum of each term of (3) over the
  neighbours in its denominator, `(f_temp(i) + f_spat(i)) / 2`. (The code sums over all tokens of the window and divides
  by the number of neighbours.)
- A given share of each window is dropped, drawn in proportion to redundancy, as in DropMAE. (The code takes what it
  computes for a probability. That depends on the window: of tokens that are all alike it drops 7 % in windows of 2
  along each axis, and 0.3 to 1 % in those of 4.)
- Neighbours are neighbours in the grid: where a shifted window goes on at the other side of the grid there are none
  across, and padding is no neighbour. (The code takes neighbours in windows of the configured size, and fails where
  the grid is smaller than that, as in the last stage of its default settings.)
- What is kept is not scaled up: a kept token is what it is in evaluation.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bundle.errors import InputError

REACH = 2  # tokens to each side: half of the published edge of 5, in space and in time
AT_ONCE = 256  # windows whose attention is held at a time; 64 MiB with 256 tokens


class RedundancyDropout:
    """Drop redundant tokens of some windows; they are drawn at the first call, and stay where it is repeated.

    (A block that is run again for its gradients must drop the same.)

    Args:
        rate: share of each window's tokens, 0 to below 1; their number is rounded.
        window: tokens along x, y, z and t.
        sides: (windows, volume): neighbours have the same number, and below 0 is padding. None: all are real and of one
            side.
    """

    def __init__(self, rate: float, window: Sequence[int], sides: Tensor | None) -> None:
        self.rate = rate
        self.window = tuple(window)
        self.sides = sides
        self.kept: Tensor | None = None

    def __call__(self, mixed: Tensor) -> Tensor:
        """Set dropped tokens of (windows, volume, c) to zero."""
        if self.kept is None:
            found = redundancy(mixed.detach(), self.window, self.sides)
            self.kept = ~draw(found, self.rate, self.sides).unsqueeze(-1)  # (windows, volume, 1)
        return mixed.where(self.kept, 0)


def check_rate(rate: float) -> float:
    """Return a rate.

    Raises:
        InputError: it is not 0 to below 1.
    """
    if not 0 <= rate < 1:
        raise InputError(f"redundancy_dropout must be 0 (none) to below 1, not {rate}")
    return rate


@torch.no_grad()
def redundancy(tokens: Tensor, window: Sequence[int], sides: Tensor | None = None) -> Tensor:
    """How redundant each token of a window is (see the module).

    Args:
        tokens: (windows, volume, c), in raster order, t fastest.
        window: tokens along x, y, z and t.
        sides: as for `RedundancyDropout`.

    Returns:
        (windows, volume), 0 to 1; 0 without neighbours, and of padding.
    """
    space, time = _neighbours(tuple(window), tokens.device)
    parts = []
    for start in range(0, len(tokens), AT_ONCE):
        part = tokens[start : start + AT_ONCE]
        scores = (part @ part.mT).float() / part.shape[-1] ** 0.5  # (n, l, l)
        near = (space, time)
        if sides is not None:
            side = sides[start : start + AT_ONCE]
            scores = scores.masked_fill((side < 0).unsqueeze(1), -torch.inf)
            same = (side.unsqueeze(1) == side.unsqueeze(2)) & (side >= 0).unsqueeze(1)
            near = (space & same, time & same)
        attention = scores.softmax(-1)
        parts.append(sum(attention.where(pairs, 0).amax(-1) for pairs in near) / 2)
    return torch.cat(parts)


def draw(redundancies: Tensor, rate: float, sides: Tensor | None = None) -> Tensor:
    """Draw tokens in proportion to their redundancy, without replacement, by torch's global generator.

    Args:
        redundancies: (windows, volume); tokens of redundancy 0 are never drawn.
        rate: share of each window's real tokens, rounded to a number of tokens.
        sides: as for `RedundancyDropout`.

    Returns:
        Bool (windows, volume), True = drawn.
    """
    every = torch.full_like(redundancies, 0, dtype=torch.int8) if sides is None else sides
    wanted = ((every >= 0).sum(1, keepdim=True).double() * rate).round()  # of each window
    # The smallest of exponential variables over weights are such a draw (Efraimidis and Spirakis 2006).
    keys = torch.empty_like(redundancies).exponential_() / redundancies
    ranks = keys.argsort(1).argsort(1)
    return (ranks < wanted) & (redundancies > 0)


@lru_cache(maxsize=32)
def _neighbours(window: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of a window's tokens that are neighbours in space, and in time: bool (volume, volume) each."""
    axes = [torch.arange(size, device=device) for size in window]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 3)  # (volume, 4)
    apart = (places.unsqueeze(0) - places.unsqueeze(1)).abs()
    near = (apart <= REACH).all(-1)
    same_place, same_frame = (apart[..., :3] == 0).all(-1), apart[..., 3] == 0
    return near & same_frame & ~same_place, near & same_place & ~same_frame
