"""The Mamba layer between its matrix products, as Triton kernels: the default on CUDA where triton can be imported.

Two operations, each with its gradient: the causal convolution with its SiLU, and the selective scan of
`bundle.networks.scan` with the softplus of its step sizes before it, the skip inside and the gate's SiLU after it.
Input and results may be bfloat16 or float16; everything inside is float32.

A program of the scan walks one sequence and BLOCK channels, with all states in registers. The state is stored every
CHUNK tokens only; the backward walk recomputes the others, HELD tokens at a time. Gradients that many programs add to
(A, B, C, D, weight, bias) are written in parts that PyTorch sums. There are no atomics: the same bits in every run on
the same GPU.

Importing this module imports triton. With TRITON_INTERPRET=1 set before that, the kernels run on CPU tensors.
"""

# A, B, C and D are the names of the paper, and Triton's compile-time constants are capitals; it knows no unpacking,
# and its language is not quite Python
# ruff: noqa: N803, N806, RUF005
# mypy: disable-error-code="misc, assignment, operator, no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Sizes are chosen by what the compiler reports (`python -m scripts.benchmarks kernels`): no spills, and as few
# registers as that allows, for many programs at once. No GPU has had a say yet.
STATES, KERNEL = 16, 4  # as in bundle.networks.mamba
OLDEST = (3, 4)  # of triton; there are no spills from 3.6 on
CHUNK = 8  # tokens between two stored states; more of them, less to recompute
HELD = 2  # tokens whose states the backward walk holds in registers; divides CHUNK
BLOCK = 32  # channels of a program: one warp's threads
LANES = 4  # B and C are loaded so many at a time
WALK: dict[str, Any] = {"CHUNK": CHUNK, "STATES": STATES, "LANES": LANES, "BLOCK": BLOCK}
WALK_BACK: dict[str, Any] = {**WALK, "HELD": HELD}
CONVOLVE: dict[str, Any] = {"TOKENS": 8, "BLOCK": 32}
# for the compiler; fused multiply-adds are its default up to triton 3.9
WALK_OPTIONS: dict[str, Any] = {"num_warps": 1, "maxnreg": 112, "enable_fp_fusion": True}
WALK_BACK_OPTIONS: dict[str, Any] = {"num_warps": 1, "maxnreg": 184, "enable_fp_fusion": True}
CONVOLVE_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
# one compilation fits all sizes, and is the one that tests see
SIZES = ("sequences", "length", "channels", "u_row", "step_row", "gate_row", "x_row")
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to rounding; log(1 + e) alone would lose the digits of a small e."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    return tl.maximum(x, 0.0) + tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sum_states(x):
    """(n / lanes, d, lanes) to (d,): first what a thread holds, then across lanes."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def _row(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def walk(
    u, step, gate, A, B, C, D, y, starts,
    length, channels, u_row, step_row, gate_row,
    CHUNK: tl.constexpr, STATES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y (b, l, d) and the state before each chunk (b, chunks, d, n)."""
    blocks = tl.cdiv(channels, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    d = block * BLOCK + tl.arange(0, BLOCK)
    # states are (n / lanes, d, lanes), so that a thread loads `lanes` values of B and C at once
    n = (tl.arange(0, STATES // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, None, :]
    at_state = d[None, :, None] * STATES + n
    real = d < channels
    real3 = real[None, :, None]
    rate = tl.load(A + at_state, mask=real3, other=0.0) * LOG2_E
    skip = tl.load(D + d, mask=real, other=0.0)
    chunks, end = tl.cdiv(length, CHUNK), (sequence + 1) * length
    h = tl.zeros((STATES // LANES, BLOCK, LANES), tl.float32)
    for chunk in range(chunks):
        tl.store(starts + (sequence * chunks + chunk) * STATES * channels + at_state, h, mask=real3)
        for k in tl.static_range(CHUNK):
            token = sequence * length + chunk * CHUNK + k
            mask, inside = d < tl.where(token < end, channels, 0), n < tl.where(token < end, STATES, 0)
            x = _row(u + token * u_row, d, mask)
            delta = _softplus(_row(step + token * step_row, d, mask))
            z = _row(gate + token * gate_row, d, mask)
            b, c = _row(B + token * STATES, n, inside), _row(C + token * STATES, n, inside)
            h = tl.exp2(delta[None, :, None] * rate) * h + (delta * x)[None, :, None] * b
            value = (_sum_states(h * c) + skip * x) * z * _sigmoid(z)
            tl.store(y + token * channels + d, value, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def walk_back(
    u, step, gate, A, B, C, D, starts, grad_y,
    grad_u, grad_step, grad_gate, grad_A, grad_B, grad_C, grad_D,
    sequences, length, channels, u_row, step_row, gate_row,
    CHUNK: tl.constexpr, HELD: tl.constexpr, STATES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients: of A and D in parts by sequence, of B and C in parts by block of channels."""
    blocks = tl.cdiv(channels, BLOCK)
    sequence, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    d = block * BLOCK + tl.arange(0, BLOCK)
    n = (tl.arange(0, STATES // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, None, :]
    at_state = d[None, :, None] * STATES + n
    real = d < channels
    real3 = real[None, :, None]
    rate = tl.load(A + at_state, mask=real3, other=0.0) * LOG2_E
    skip = tl.load(D + d, mask=real, other=0.0)
    chunks, end = tl.cdiv(length, CHUNK), (sequence + 1) * length
    carry = tl.zeros((STATES // LANES, BLOCK, LANES), tl.float32)  # dL/dh of the token before, from later tokens
    total_A = tl.zeros((STATES // LANES, BLOCK, LANES), tl.float32)
    total_D = tl.zeros((BLOCK,), tl.float32)
    pieces = tl.cdiv(length, HELD)
    for back in range(pieces):
        first = (pieces - 1 - back) * HELD
        chunk = first // CHUNK
        h = tl.load(starts + (sequence * chunks + chunk) * STATES * channels + at_state, mask=real3, other=0.0)
        for t in range(chunk * CHUNK, first):
            token = sequence * length + t
            x, delta = _row(u + token * u_row, d, real), _softplus(_row(step + token * step_row, d, real))
            b = tl.load(B + token * STATES + n).to(tl.float32)
            h = tl.exp2(delta[None, :, None] * rate) * h + (delta * x)[None, :, None] * b
        states, grads = (), ()  # before each token of the piece; dL/d(y before its gate)
        for k in tl.static_range(HELD):
            token = sequence * length + first + k
            mask, inside = d < tl.where(token < end, channels, 0), n < tl.where(token < end, STATES, 0)
            x, delta = _row(u + token * u_row, d, mask), _softplus(_row(step + token * step_row, d, mask))
            z, grad = _row(gate + token * gate_row, d, mask), _row(grad_y + token * channels, d, mask)
            b, c = _row(B + token * STATES, n, inside), _row(C + token * STATES, n, inside)
            states = states + (h,)
            h = tl.exp2(delta[None, :, None] * rate) * h + (delta * x)[None, :, None] * b
            open = _sigmoid(z)
            value = (_sum_states(h * c) + skip * x) * open * (1.0 + z * (1.0 - open))
            tl.store(grad_gate + token * channels + d, grad * value, mask=mask)
            grads = grads + (grad * z * open,)
            part = grad_C + (block.to(tl.int64) * sequences * length + token) * STATES
            tl.store(part + n, tl.sum((grad * z * open)[None, :, None] * h, axis=1, keep_dims=True), mask=inside)
        for k in tl.static_range(HELD - 1, -1, -1):
            # past the end every gradient is zero, as grad_y is
            token = sequence * length + first + k
            mask, inside = d < tl.where(token < end, channels, 0), n < tl.where(token < end, STATES, 0)
            x, raw = _row(u + token * u_row, d, mask), _row(step + token * step_row, d, mask)
            b, c = _row(B + token * STATES, n, inside), _row(C + token * STATES, n, inside)
            delta = _softplus(raw)
            grad_h = grads[k][None, :, None] * c + carry
            part = grad_B + (block.to(tl.int64) * sequences * length + token) * STATES
            tl.store(part + n, tl.sum((delta * x)[None, :, None] * grad_h, axis=1, keep_dims=True), mask=inside)
            grad_drive = _sum_states(grad_h * b)
            carry = tl.exp2(delta[None, :, None] * rate) * grad_h
            grad_exponent = carry * states[k]  # d h[t] / d (delta[t] A) = gain[t] h[t-1]
            total_A += grad_exponent * delta[None, :, None]
            total_D += grads[k] * x
            grad_delta = _sum_states(grad_exponent * rate) / LOG2_E + grad_drive * x
            tl.store(grad_u + token * channels + d, grad_drive * delta + skip * grads[k], mask=mask)
            tl.store(grad_step + token * channels + d, grad_delta * _sigmoid(raw), mask=mask)
    tl.store(grad_A + sequence * channels * STATES + at_state, total_A, mask=real3)
    tl.store(grad_D + sequence * channels + d, total_D, mask=real)


@triton.jit
def _tokens(pointer, sequence, t, row, d, length, channels):
    """Tokens t of a sequence, (t, d), zero outside of it."""
    inside = ((t >= 0) & (t < length))[:, None] & (d < channels)[None, :]
    return _row(pointer, (sequence * length + t)[:, None] * row + d[None, :], inside)


@triton.jit(do_not_specialize=SIZES)
def convolve_kernel(x, weight, bias, y, length, channels, x_row, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Write y (b, l, d), the SiLU of the convolution with 4 taps, `weight` (d, 4)."""
    blocks = tl.cdiv(channels, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = d < channels
    for first in range(0, length, TOKENS):
        t = first + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, BLOCK), tl.float32) + tl.load(bias + d, mask=real, other=0.0)[None, :]
        for k in tl.static_range(4):
            tap = tl.load(weight + d * 4 + k, mask=real, other=0.0)
            total += tap[None, :] * _tokens(x, sequence, t + k - 3, x_row, d, length, channels)
        inside = (t < length)[:, None] & real[None, :]
        tl.store(y + (sequence * length + t)[:, None] * channels + d[None, :], total * _sigmoid(total), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def convolve_back_kernel(
    x, weight, bias, grad_y, grad_x, grad_taps,
    length, channels, x_row, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients; those of the four taps and of the bias in parts by sequence (b, 5, d)."""
    blocks = tl.cdiv(channels, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = d < channels
    offset = tl.load(bias + d, mask=real, other=0.0)[None, :]
    taps = ()
    totals = ()
    for k in tl.static_range(4):
        taps = taps + (tl.load(weight + d * 4 + k, mask=real, other=0.0)[None, :],)
        totals = totals + (tl.zeros((BLOCK,), tl.float32),)
    total_bias = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, TOKENS):
        t = first + tl.arange(0, TOKENS)
        before = ()  # tokens t - 3 to t + 3
        for k in tl.static_range(7):
            before = before + (_tokens(x, sequence, t + k - 3, x_row, d, length, channels),)
        grad_t = tl.zeros((TOKENS, BLOCK), tl.float32)
        for later in tl.static_range(4):  # x[t] is seen by the results t to t + 3
            total = offset + taps[0] * before[later] + taps[1] * before[later + 1]
            total += taps[2] * before[later + 2] + taps[3] * before[later + 3]
            open = _sigmoid(total)
            grad = _tokens(grad_y, sequence, t + later, channels, d, length, channels)
            grad = grad * open * (1.0 + total * (1.0 - open))
            grad_t += taps[3 - later] * grad
            if later == 0:
                total_bias += tl.sum(grad, axis=0)
                totals = (
                    totals[0] + tl.sum(grad * before[0], axis=0),
                    totals[1] + tl.sum(grad * before[1], axis=0),
                    totals[2] + tl.sum(grad * before[2], axis=0),
                    totals[3] + tl.sum(grad * before[3], axis=0),
                )
        inside = (t < length)[:, None] & real[None, :]
        tl.store(grad_x + (sequence * length + t)[:, None] * channels + d[None, :], grad_t, mask=inside)
    for k in tl.static_range(4):
        tl.store(grad_taps + (sequence * 5 + k) * channels + d, totals[k], mask=real)
    tl.store(grad_taps + (sequence * 5 + 4) * channels + d, total_bias, mask=real)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor (b, l, d), copied unless its tokens lie at one distance, as halves of a projection do."""
    evenly = tensor.stride(2) == 1 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if evenly else tensor.contiguous()


def _check(*tensors: Tensor) -> None:
    """The kernels would take float64 and lose half of its digits."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"The Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}")


class _GatedScan(torch.autograd.Function):
    """The scan with its gradient; only the state before each chunk is stored."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Tensor:
        b, length, channels = u.shape
        ctx.dtypes = [tensor.dtype for tensor in (A, B, C, D)]
        u, step, gate = _rows(u), _rows(step), _rows(gate)
        A, B, C, D = A.float().contiguous(), B.contiguous(), C.contiguous(), D.float().contiguous()
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        starts = A.new_empty(b, triton.cdiv(length, CHUNK), channels, STATES)
        rows = (u.stride(1), step.stride(1), gate.stride(1))
        with torch.cuda.device_of(u):
            walk[(b * triton.cdiv(channels, BLOCK),)](
                u, step, gate, A, B, C, D, y, starts, length, channels, *rows, **WALK, **WALK_OPTIONS
            )
        ctx.save_for_backward(u, step, gate, A, B, C, D, starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        u, step, gate, A, B, C, D, starts = ctx.saved_tensors
        b, length, channels = u.shape
        blocks = triton.cdiv(channels, BLOCK)
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, step, gate)]
        grad_A, grad_D = A.new_empty(b, channels, STATES), D.new_empty(b, channels)
        grad_B, grad_C = A.new_empty(2, blocks, b, length, STATES)
        rows = (u.stride(1), step.stride(1), gate.stride(1))
        with torch.cuda.device_of(u):
            walk_back[(b * blocks,)](
                u, step, gate, A, B, C, D, starts, grad_y.contiguous(), *grads, grad_A, grad_B, grad_C, grad_D,
                b, length, channels, *rows, **WALK_BACK, **WALK_BACK_OPTIONS,
            )  # fmt: skip
        parts = (
            part.sum(0).to(dtype) for part, dtype in zip((grad_A, grad_B, grad_C, grad_D), ctx.dtypes, strict=True)
        )
        grad_u, grad_step, grad_gate = grads
        return grad_u, grad_step, *parts, grad_gate


def gated_scan(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Tensor:
    """`selective_scan(u, softplus(step), A, B, C, D) * silu(gate)` in one kernel.

    Args:
        u: input (b, l, d).
        step: step sizes before their softplus (b, l, d).
        A: decay rates (d, 16), negative.
        B: input weights (b, l, 16).
        C: output weights (b, l, 16).
        D: skip weights (d,).
        gate: (b, l, d).

    Returns:
        y (b, l, d) of u's type, differentiable once with respect to every argument.

    Raises:
        TypeError: an argument is of another type than float32, bfloat16 and float16.
    """
    _check(u, step, A, B, C, D, gate)
    return _GatedScan.apply(u, step, A, B, C, D, gate)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        b, length, channels = x.shape
        ctx.dtypes = (weight.dtype, bias.dtype)
        x, weight, bias = _rows(x), weight.float().contiguous(), bias.float().contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            convolve_kernel[(b * triton.cdiv(channels, CONVOLVE["BLOCK"]),)](
                x, weight, bias, y, length, channels, x.stride(1), **CONVOLVE, **CONVOLVE_OPTIONS
            )
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        b, length, channels = x.shape
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_taps = weight.new_empty(b, KERNEL + 1, channels)
        with torch.cuda.device_of(x):
            convolve_back_kernel[(b * triton.cdiv(channels, CONVOLVE["BLOCK"]),)](
                x, weight, bias, grad_y.contiguous(), grad_x, grad_taps, length, channels, x.stride(1),
                **CONVOLVE, **CONVOLVE_OPTIONS,
            )  # fmt: skip
        total = grad_taps.sum(0)  # (taps and bias, d)
        grad_weight = total[:KERNEL].t().reshape(weight.shape)
        return grad_x, grad_weight.to(ctx.dtypes[0]), total[KERNEL].to(ctx.dtypes[1])


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the causal convolution of every channel by itself, of x's type.

    Args:
        x: (b, l, d).
        weight: (d, 1, 4), as `nn.Conv1d` has it.
        bias: (d,).

    Raises:
        TypeError: an argument is of another type than float32, bfloat16 and float16.
    """
    _check(x, weight, bias)
    return _Convolve.apply(x, weight, bias)


def try_out(device: torch.device) -> None:
    """Compile the smallest kernel and run it, so that what a machine lacks is known before it is needed.

    Raises:
        ImportError: triton is too old.
        RuntimeError: there is no C compiler for the launcher, or the driver does not take the kernel.
    """
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}")
    half = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=device)  # the type of training
    convolve(half, half.new_zeros(1, 1, KERNEL, dtype=torch.float32), half.new_zeros(1, dtype=torch.float32)).cpu()
