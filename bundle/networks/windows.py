"""Windows of a grid of tokens (b, x, y, z, t, c): fitted, shifted, padded, cut and joined again."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bundle.networks.graphs import gradient_needed


def fit_window(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shrink the window to the grid, without a shift, along every axis where the grid is not larger."""
    fits = [size > width for size, width in zip(grid, window, strict=True)]
    return (
        tuple(width if fit else size for size, width, fit in zip(grid, window, fits, strict=True)),
        tuple(step if fit else 0 for step, fit in zip(shift, fits, strict=True)),
    )


def split_windows(tokens: Tensor, window: Sequence[int]) -> Tensor:
    """Cut (b, x, y, z, t, c) into windows (b * windows, volume, c), both in raster order, t fastest."""
    b, *grid, c = tokens.shape
    pairs = [size for full, width in zip(grid, window, strict=True) for size in (full // width, width)]
    # (b, nx, wx, ny, wy, nz, wz, nt, wt, c) -> (b, nx, ny, nz, nt, wx, wy, wz, wt, c)
    return tokens.reshape(b, *pairs, c).permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).reshape(-1, math.prod(window), c)


class _Reorder(torch.autograd.Function):
    """Take tokens by index along axis 1; the gradient is taken by the inverse index instead of added up."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return tokens.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


def _reorder(tokens: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Take tokens by index along axis 1."""
    return _Reorder.apply(tokens, index, inverse) if gradient_needed(tokens) else tokens.index_select(1, index)


class Windows:
    """Where each token of a grid stands once it is padded to whole windows, shifted and cut into windows.

    Padding, shift and cut are one gather, undone by another. Padding repeats the last token of the grid, to be
    blanked by whoever must not see it.

    Args:
        grid: tokens along x, y, z and t.
        window: tokens of a window.
        shift: by how much the windows are moved along each axis; the padded grid is periodic.
        device: where the tokens are.

    Attributes:
        real: bool (windows, volume, 1), False for padding; None if nothing is padded.
    """

    def __init__(self, grid: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> None:
        self.grid, self.volume, self.shift = tuple(grid), math.prod(window), tuple(shift)
        total = math.prod(grid)
        places = torch.arange(total, device=device).view(1, *grid, 1)
        missing = [-size % width for size, width in zip(grid, window, strict=True)]
        if any(missing):
            # functional.pad counts from the last axis: c, t, z, y, x
            places = functional.pad(places, (0, 0, *(pad for m in reversed(missing) for pad in (0, m))), value=total)
        order = split_windows(places.roll([-step for step in shift], (1, 2, 3, 4)), window).flatten()
        targets = torch.arange(len(order), device=device)
        self._inverse = order.new_empty(total + 1).scatter_(0, order, targets)[:total]  # padding goes to the last
        self._order = order.clamp(max=total - 1)
        self.real = (order < total).view(-1, self.volume, 1) if any(missing) else None

    def cut(self, tokens: Tensor) -> Tensor:
        """Turn (b, x, y, z, t, c) into windows (b * windows, volume, c)."""
        flat = _reorder(tokens.flatten(1, 4), self._order, self._inverse)
        return flat.reshape(-1, self.volume, tokens.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """Undo `cut`; no gradient must come back for padding, so it is blanked."""
        if self.real is not None:
            windows = windows.view(-1, *self.real.shape[:2], windows.shape[-1]).where(self.real, 0)
        flat = windows.reshape(-1, len(self._order), windows.shape[-1])
        return _reorder(flat, self._inverse, self._order).unflatten(1, self.grid)

    def sides(self) -> Tensor | None:
        """Which tokens of a window lie together in the grid, too: int8 (windows, volume), or None if all do.

        A shifted window at the end of the grid goes on at its beginning. Tokens there have another number than those
        at the end; -1 is padding.
        """
        if self.real is None and not any(self.shift):
            return None
        side = torch.zeros(1, *self.grid, 1, dtype=torch.int8, device=self._order.device)
        for axis, step in enumerate(self.shift):
            side.narrow(1 + axis, 0, step).add_(2**axis)
        sides = self.cut(side)
        return (sides if self.real is None else sides.where(self.real, -1)).squeeze(-1)
