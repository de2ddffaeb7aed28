"""The Mamba layer between its matrix products, as Triton kernels: the default on CUDA where triton can be imported.

Two operations, each with its gradient: the causal convolution with its SiLU, and the selective scan of
`bundle.networks.scan` with the softplus of its step sizes before it, the skip inside and the gate's SiLU after it.
Input and results may be bfloat16 or float16; everything inside is float32.

A program of the scan walks one sequence and BLOCK channels, CHUNK tokens at a time, with their states in registers. The
state before each chunk is stored; the backward walk recomputes the others. States are (t, n, d, d, n): Triton gives the
last two axes to the 32 threads of a warp, and the others to each thread, so that sums over channels (for B and C) and
over states take few exchanges between threads. Loops are `while`, as the interpreter of triton 3.6 counts up to no
number but a constant, with numpy 2.4. Gradients that many programs add to (A, B, C, D, weight, bias) are written in
parts that PyTorch sums. There are no atomics: the same bits in every run on
the same GPU.

Importing this module imports triton. With TRITON_INTERPRET=1 set before that, the kernels run on CPU tensors.
"""

# A, B, C and D are the names of the paper, and Triton's compile-time constants are capitals; it knows no unpacking,
# and its language is not quite Python
# flake8: noqa: N803, N806, RUF005
# mypy: disable-error-code="misc, assignment, attr-defined, operator, no-untyped-def"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Sizes are chosen by what the compiler reports (`python -m scripts.benchmarks kernels`): no spills, few instructions
# and shuffles for a token and channel, and as few registers as that allows; an H200 agreed (docs/performance.md).
STATES, KERNEL = 16, 4  # as in bundle.networks.mamba
OLDEST = (3, 4)  # of triton; there are no spills from 3.6 on
CHUNK = 4  # tokens that are walked at once, between two stored states
# A program is one warp: LANES channels by 32 / LANES groups of states, with BLOCK / LANES channels in each thread.
WALK: dict[str, Any] = {"CHUNK": CHUNK, "STATES": STATES, "LANES": 8, "BLOCK": 8}
WALK_BACK: dict[str, Any] = {"CHUNK": CHUNK, "STATES": STATES, "LANES": 4, "BLOCK": 8}
CONVOLVE: dict[str, Any] = {"TOKENS": 8, "BLOCK": 32}
# for the compiler; fused multiply-adds are its default up to triton 3.9
WALK_OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
WALK_BACK_OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
CONVOLVE_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
# one compilation fits all sizes, and is the one that tests see
SIZES = ("sequences", "length", "channels", "u_row", "step_row", "gate_row", "x_row", "B_row", "C_row")
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
def _row(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _places(first, STATES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Channels d (d,), states n (n, n), and channels of the states (1, d, d, 1) of a block that begins at `first`."""
    ACROSS: tl.constexpr = 32 // LANES
    EACH: tl.constexpr = STATES // ACROSS
    d = first + tl.arange(0, BLOCK)
    n = tl.arange(0, ACROSS)[None, :] * EACH + tl.arange(0, EACH)[:, None]
    d4 = first + tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return d, n, d4[None, :, :, None]


@triton.jit
def _spread(x, LANES: tl.constexpr):
    """(t, d) to (t, 1, d / lanes, lanes, 1)."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // LANES, LANES))[:, None, :, :, None]


@triton.jit
def _sum_states(x):
    """(t, n, d, d, n) to (t, d): first what a thread holds, then across lanes."""
    x = tl.sum(tl.sum(x, axis=1), axis=3)
    return tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))


@triton.jit
def _sum_channels(x):
    """(t, n, d, d, n) to (t, n, n)."""
    return tl.sum(tl.sum(x, axis=2), axis=2)


@triton.jit
def _take(x, here):
    """The one of (t, ...) where `here` is true, costs nothing: a thread holds all t, and zeros are left out."""
    return tl.sum(tl.where(here, x.to(tl.int32, bitcast=True), 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SIZES)
def walk(
    u, step, gate, A, B, C, D, y, starts,
    length, channels, u_row, step_row, gate_row, B_row, C_row,
    CHUNK: tl.constexpr, STATES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y (b, l, d) and the state before each chunk (b, chunks, d, n)."""
    blocks = tl.cdiv(channels, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    d, n, d4 = _places((tl.program_id(0) % blocks) * BLOCK, STATES, LANES, BLOCK)
    real, real4 = d < channels, d4 < channels
    at_state = d4 * STATES + n[:, None, None, :]
    rate = tl.load(A + at_state, mask=real4, other=0.0) * LOG2_E
    skip = tl.load(D + d, mask=real, other=0.0)[None, :]
    k = tl.arange(0, CHUNK)
    k5 = k[:, None, None, None, None]
    chunks = tl.cdiv(length, CHUNK)
    starts += sequence * chunks * STATES * channels
    h = tl.zeros((n.shape[0], BLOCK // LANES, LANES, n.shape[1]), tl.float32)
    chunk = 0
    while chunk < chunks:
        tl.store(starts + chunk.to(tl.int64) * STATES * channels + at_state, h, mask=real4)
        t = (chunk * CHUNK + k)[:, None]
        token = sequence * length + t
        mask, inside = (t < length) & real[None, :], (t < length)[:, :, None] & (n < STATES)[None, :, :]
        x = _row(u, token * u_row + d[None, :], mask)
        delta = _softplus(_row(step, token * step_row + d[None, :], mask))
        z = _row(gate, token * gate_row + d[None, :], mask)
        b = _row(B, (token * B_row)[:, :, None] + n[None, :, :], inside)[:, :, None, None, :]
        c = _row(C, (token * C_row)[:, :, None] + n[None, :, :], inside)[:, :, None, None, :]
        gain = tl.exp2(_spread(delta, LANES) * rate[None])
        drive = _spread(delta * x, LANES) * b
        states = tl.zeros_like(gain)  # after each token
        for i in tl.static_range(CHUNK):
            h = _take(gain, k5 == i) * h + _take(drive, k5 == i)
            states = tl.where(k5 == i, h[None], states)
        value = (_sum_states(states * c) + skip * x) * z * _sigmoid(z)
        tl.store(y + token * channels + d[None, :], value, mask=mask)
        chunk += 1


@triton.jit(do_not_specialize=SIZES)
def walk_back(
    u, step, gate, A, B, C, D, starts, grad_y,
    grad_u, grad_step, grad_gate, grad_A_D, grad_B, grad_C,
    sequences, length, channels, u_row, step_row, gate_row, B_row, C_row,
    CHUNK: tl.constexpr, STATES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients: of A and D in parts by sequence, of B and C in parts by block of channels."""
    blocks = tl.cdiv(channels, BLOCK)
    sequence, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    d, n, d4 = _places(block * BLOCK, STATES, LANES, BLOCK)
    real, real4 = d < channels, d4 < channels
    at_state = d4 * STATES + n[:, None, None, :]
    rate = tl.load(A + at_state, mask=real4, other=0.0) * LOG2_E
    skip = tl.load(D + d, mask=real, other=0.0)[None, :]
    k = tl.arange(0, CHUNK)
    k5 = k[:, None, None, None, None]
    chunks = tl.cdiv(length, CHUNK)
    starts += sequence * chunks * STATES * channels
    part = (block.to(tl.int64) * sequences + sequence) * length * STATES
    grad_B += part
    grad_C += part
    carry = tl.zeros((n.shape[0], BLOCK // LANES, LANES, n.shape[1]), tl.float32)  # dL/dh of the token before
    total_A = tl.zeros((n.shape[0], BLOCK // LANES, LANES, n.shape[1]), tl.float32)
    total_D = tl.zeros((CHUNK, BLOCK), tl.float32)
    chunk = chunks - 1
    while chunk >= 0:
        h = tl.load(starts + chunk.to(tl.int64) * STATES * channels + at_state, mask=real4, other=0.0)
        t = (chunk * CHUNK + k)[:, None]
        token = sequence * length + t
        mask, inside = (t < length) & real[None, :], (t < length)[:, :, None] & (n < STATES)[None, :, :]
        x, raw = _row(u, token * u_row + d[None, :], mask), _row(step, token * step_row + d[None, :], mask)
        z, grad = _row(gate, token * gate_row + d[None, :], mask), _row(grad_y, token * channels + d[None, :], mask)
        b = _row(B, (token * B_row)[:, :, None] + n[None, :, :], inside)[:, :, None, None, :]
        c = _row(C, (token * C_row)[:, :, None] + n[None, :, :], inside)[:, :, None, None, :]
        delta, open = _softplus(raw), _sigmoid(z)
        grad_value = grad * z * open  # past the end every gradient is zero, as grad_y is
        delta5, drive5, grad5 = _spread(delta, LANES), _spread(delta * x, LANES), _spread(grad_value, LANES)
        gain = tl.exp2(delta5 * rate[None])
        drive = drive5 * b
        before, after = tl.zeros_like(gain), tl.zeros_like(gain)  # states
        for i in tl.static_range(CHUNK):
            before = tl.where(k5 == i, h[None], before)
            h = _take(gain, k5 == i) * h + _take(drive, k5 == i)
            after = tl.where(k5 == i, h[None], after)
        value = (_sum_states(after * c) + skip * x) * open * (1.0 + z * (1.0 - open))
        tl.store(grad_gate + token * channels + d[None, :], grad * value, mask=mask)
        at_part = (t * STATES)[:, :, None] + n[None, :, :]
        tl.store(grad_C + at_part, _sum_channels(grad5 * after), mask=inside)
        direct, grad_h = grad5 * c, tl.zeros_like(gain)
        for i in tl.static_range(CHUNK - 1, -1, -1):
            now = _take(direct, k5 == i) + carry
            grad_h = tl.where(k5 == i, now[None], grad_h)
            carry = _take(gain, k5 == i) * now
        tl.store(grad_B + at_part, _sum_channels(drive5 * grad_h), mask=inside)
        grad_drive = _sum_states(grad_h * b)
        grad_exponent = gain * grad_h * before  # d h[t] / d (delta[t] A) = gain[t] h[t-1]
        total_A += tl.sum(grad_exponent * delta5, axis=0)
        total_D += grad_value * x
        grad_delta = _sum_states(grad_exponent * rate[None]) / LOG2_E + grad_drive * x
        tl.store(grad_u + token * channels + d[None, :], grad_drive * delta + skip * grad_value, mask=mask)
        tl.store(grad_step + token * channels + d[None, :], grad_delta * _sigmoid(raw), mask=mask)
        chunk -= 1
    grad_A_D += sequence * channels * (STATES + 1)
    tl.store(grad_A_D + at_state, total_A, mask=real4)
    tl.store(grad_A_D + channels * STATES + d, tl.sum(total_D, axis=0), mask=real)


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
    first = 0
    while first < length:
        t = first + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, BLOCK), tl.float32) + tl.load(bias + d, mask=real, other=0.0)[None, :]
        for k in tl.static_range(4):
            tap = tl.load(weight + d * 4 + k, mask=real, other=0.0)
            total += tap[None, :] * _tokens(x, sequence, t + k - 3, x_row, d, length, channels)
        inside = (t < length)[:, None] & real[None, :]
        tl.store(y + (sequence * length + t)[:, None] * channels + d[None, :], total * _sigmoid(total), mask=inside)
        first += TOKENS


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
    first = 0
    while first < length:
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
        first += TOKENS
    for k in tl.static_range(4):
        tl.store(grad_taps + (sequence * 5 + k) * channels + d, totals[k], mask=real)
    tl.store(grad_taps + (sequence * 5 + 4) * channels + d, total_bias, mask=real)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor (b, l, d), copied unless its tokens lie at one distance, as halves of a projection do."""
    evenly = tensor.stride(2) == 1 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if evenly else tensor.contiguous()


def check_types(*tensors: Tensor) -> None:
    """Refuse float64: the kernels would take it and lose half of its digits.

    Raises:
        TypeError: a tensor is of another type than float32, bfloat16 and float16.
    """
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"The Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}")


class _GatedScan(torch.autograd.Function):
    """The scan with its gradient; only the state before each chunk is stored."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Tensor:
        b, length, channels = u.shape
        ctx.dtypes = [tensor.dtype for tensor in (A, B, C, D)]
        u, step, gate, B, C = (_rows(tensor) for tensor in (u, step, gate, B, C))
        A, D = A.float().contiguous(), D.float().contiguous()
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        starts = A.new_empty(b, triton.cdiv(length, CHUNK), channels, STATES)
        ctx.rows = [tensor.stride(1) for tensor in (u, step, gate, B, C)]
        with torch.cuda.device_of(u):
            walk[(b * triton.cdiv(channels, WALK["BLOCK"]),)](
                u, step, gate, A, B, C, D, y, starts, length, channels, *ctx.rows, **WALK, **WALK_OPTIONS
            )
        ctx.save_for_backward(u, step, gate, A, B, C, D, starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        u, step, gate, A, B, C, D, starts = ctx.saved_tensors
        b, length, channels = u.shape
        blocks = triton.cdiv(channels, WALK_BACK["BLOCK"])
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, step, gate)]
        grad_A_D = A.new_empty(b, channels * (STATES + 1))
        grad_B_C = A.new_empty(2, blocks, b, length, STATES)
        with torch.cuda.device_of(u):
            walk_back[(b * blocks,)](
                u, step, gate, A, B, C, D, starts, grad_y.contiguous(), *grads, grad_A_D, *grad_B_C,
                b, length, channels, *ctx.rows, **WALK_BACK, **WALK_BACK_OPTIONS,
            )  # fmt: skip
        # few launches: one sum for A and D, another and one cast for B and C
        grad_A, grad_D = grad_A_D.sum(0).split([channels * STATES, channels])
        grad_B_C = grad_B_C.sum(1) if blocks > 1 else grad_B_C[:, 0]
        grad_B, grad_C = grad_B_C.to(torch.promote_types(*ctx.dtypes[1:3]))
        parts = (grad_A.view(A.shape), grad_B, grad_C, grad_D)
        grad_u, grad_step, grad_gate = grads
        return grad_u, grad_step, *(p.to(dtype) for p, dtype in zip(parts, ctx.dtypes, strict=True)), grad_gate


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
    check_types(u, step, A, B, C, D, gate)
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
    check_types(x, weight, bias)
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
