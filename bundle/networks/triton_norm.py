"""A residual sum and its LayerNorm as one Triton kernel, for few channels: the default on CUDA, as `triton_scan` is.

A program normalises some rows at a time. Everything inside is float32. Gradients of weight and bias are written in
parts that PyTorch sums; there are no atomics.
"""

# flake8: noqa: N803
# mypy: disable-error-code="misc, no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from bundle.networks.triton_scan import check_types

TILE = 512  # values of a program at a time, 16 of a thread
PROGRAMS = 8192  # at most, in the backward pass: so many parts are summed
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
SIZES = ("rows", "programs")


@triton.jit
def _rows(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _standardise(x, inside, eps, CHANNELS: tl.constexpr):
    """Rows (r, c) of mean 0 and variance 1, and what they were divided by (r, 1)."""
    x = tl.where(inside, x - (tl.sum(x, axis=1) / CHANNELS)[:, None], 0.0)
    sd = tl.sqrt(tl.sum(x * x, axis=1) / CHANNELS + eps)[:, None]
    return x / sd, sd


@triton.jit(do_not_specialize=SIZES)
def add_norm(
    stream, added, weight, bias, total, y, rows, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """Write total = stream + added, if ADDS, and y, its LayerNorm; all (rows, channels)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at, inside = row * CHANNELS + column, (row < rows) & (column < CHANNELS)
    value = _rows(stream, at, inside)
    if ADDS:
        value += _rows(added, at, inside)
        tl.store(total + at, value, mask=inside)
    normal, _ = _standardise(value, inside, eps, CHANNELS)
    real = column < CHANNELS
    tl.store(y + at, normal * _rows(weight, column, real) + _rows(bias, column, real), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def add_norm_back(
    total, weight, grad_total, grad_y, grad_stream, grad_added, parts, rows, eps, programs,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr, RESTS: tl.constexpr,
):  # fmt: skip
    """Write the gradients, plus grad_total if RESTS; of weight and bias in parts (programs, 2, channels)."""
    column = tl.arange(0, COLUMNS)[None, :]
    scale = _rows(weight, column, column < CHANNELS)
    total_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)[:, None]
        at, inside = row * CHANNELS + column, (row < rows) & (column < CHANNELS)
        normal, sd = _standardise(_rows(total, at, inside), inside, eps, CHANNELS)
        grad = _rows(grad_y, at, inside)
        total_weight += grad * normal
        total_bias += grad
        grad *= scale
        level = (tl.sum(grad, axis=1) / CHANNELS)[:, None]
        slope = (tl.sum(grad * normal, axis=1) / CHANNELS)[:, None]
        grad = (grad - level - normal * slope) / sd
        if RESTS:
            grad += _rows(grad_total, at, inside)
        tl.store(grad_stream + at, grad, mask=inside)
        if ADDS:
            tl.store(grad_added + at, grad, mask=inside)
        first += programs.to(tl.int64) * ROWS
    place = parts + tl.program_id(0) * 2 * CHANNELS + tl.arange(0, COLUMNS)
    real = tl.arange(0, COLUMNS) < CHANNELS
    tl.store(place, tl.sum(total_weight, axis=0), mask=real)
    tl.store(place + CHANNELS, tl.sum(total_bias, axis=0), mask=real)


def constants(channels: int) -> dict[str, int]:
    """Compile-time constants; whole rows, padded to a power of two."""
    columns = triton.next_power_of_2(channels)
    return {"CHANNELS": channels, "ROWS": max(1, TILE // columns), "COLUMNS": columns}


def options(channels: int) -> dict[str, Any]:
    """For the compiler: a warp for every TILE values of a row."""
    return {"num_warps": max(1, triton.next_power_of_2(channels) // TILE), **OPTIONS}


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        channels = x.shape[-1]
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.added = eps, None if added is None else added.dtype
        x, added = x.contiguous(), None if added is None else added.contiguous()
        total = x if added is None else torch.empty_like(x)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        rows, sizes = x.numel() // channels, constants(channels)
        with torch.cuda.device_of(x):
            add_norm[(triton.cdiv(rows, sizes["ROWS"]),)](
                x, x if added is None else added, weight, bias, total, y, rows, eps,
                **sizes, ADDS=added is not None, **options(channels),
            )  # fmt: skip
        ctx.save_for_backward(total, weight)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        channels = total.shape[-1]
        rows, sizes = total.numel() // channels, constants(channels)
        programs = min(PROGRAMS, triton.cdiv(rows, sizes["ROWS"]))
        grad_x = torch.empty_like(total)
        same = ctx.added in (None, total.dtype)
        grad_added = grad_x if same else torch.empty(total.shape, dtype=ctx.added, device=total.device)
        parts = torch.empty(programs, 2, channels, dtype=torch.float32, device=total.device)
        with torch.cuda.device_of(total):
            add_norm_back[(programs,)](
                total, weight, grad_x if grad_total is None else grad_total.contiguous(), grad_y.contiguous(),
                grad_x, grad_added, parts, rows, ctx.eps, programs,
                **sizes, ADDS=not same, RESTS=grad_total is not None, **options(channels),
            )  # fmt: skip
        grad_weight, grad_bias = parts.sum(0).to(weight.dtype)
        return grad_x, None if ctx.added is None else grad_added, grad_weight, grad_bias, None, None


def residual_norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + added` (or x for None), and its LayerNorm over the last axis, in one kernel.

    Args:
        x: (..., c).
        added: the same shape, maybe of another type.
        weight: (c,).
        bias: (c,).
        eps: added to the variance.

    Returns:
        The sum, of x's type, and its LayerNorm, of the type in which autocast computes matrix products, or else of x's.
        Both are differentiable once with respect to every tensor.

    Raises:
        TypeError: an argument is of another type than float32, bfloat16 and float16.
    """
    check_types(x, weight, bias, *(() if added is None else (added,)))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _AddNorm.apply(x, added, weight, bias, eps, dtype)
