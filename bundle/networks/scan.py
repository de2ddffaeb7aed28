"""The selective scan of Mamba in plain PyTorch, fast enough on a CPU to train small models.

For every sequence and channel `d` there are N hidden values that follow (Gu and Dao, "Mamba: Linear-Time
Sequence Modeling with Selective State Spaces", 2023, section 3.2, with the simplified discretisation of its
code):

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],        y[t] = C[t] . h[t] + D u[t],        h[-1] = 0

Storing every h[t] needs N times the memory of the input, and working in log space with cumulative sums
overflows. So the tokens are walked in order, `CHUNK` at a time, for a tile of sequences whose states fit into
the cache. Only the state at the start of each chunk is saved_states; the backward pass recomputes the rest. On a CPU
both walks, forward and back, also exist in C, for those who install them (`bundle.networks.compiled`).

In PyTorch they make many short parallel calls. On a CPU that other processes use as well, the idle OpenMP threads
waiting between them make them up to ten times slower; set OMP_WAIT_POLICY=passive, or use one thread per process.
"""

# flake8: noqa: N803, N806 - A, B, C and D are the names of the paper

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bundle.networks import compiled, graphs
from bundle.networks.compiled import CHUNK

CPU_TILE = 1 << 20  # elements of a work buffer, 4 MiB: smaller pays more per call, larger leaves the cache
CUDA_TILE = 1 << 27  # elements of a work buffer, 512 MiB: few, large kernels matter more than the cache


def selective_scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Same as `selective_scan`, written as the textbook loop: the reference for tests, benchmarks and TorchScript.

    Plain autograd keeps every state, so this is slow and needs about N times the memory.
    """
    state = u.new_zeros(u.shape[0], A.shape[0], A.shape[1])  # (b, d, n)
    outputs = []
    for t in range(u.shape[1]):
        gain = torch.exp(delta[:, t, :, None] * A)
        state = gain * state + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1) + D * u


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, saved_states: list[Tensor] | None = None
) -> Tensor:
    """Run the recurrence over the tokens of every sequence.

    Half-precision input (autocast) is computed in float32; float64 stays float64.

    Args:
        u: input (b, l, d).
        delta: positive step sizes (b, l, d).
        A: decay rates (d, n), negative.
        B: input weights (b, l, n).
        C: output weights (b, l, n).
        D: skip weights (d,).
        saved_states: for checkpointing around the scan. An empty list receives the result and the states that the
            backward pass needs; a filled one is emptied and gives them back, so that the scan runs once only.

    Returns:
        y (b, l, d), differentiable once with respect to every argument.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    with nullcontext() if graphs.written_down() else torch.autocast(u.device.type, enabled=False):
        tensors = [tensor.to(dtype) for tensor in (u, delta, A, B, C, D)]
        if graphs.exporting():
            return _scan_operator(*tensors)
        if torch.jit.is_tracing():
            return _scripted_loop()(*tensors)
        if saved_states is None and not graphs.gradient_needed(*tensors):
            walk, _ = _walks(*tensors)
            return walk(*tensors)[0]
        return _SelectiveScan.apply(*tensors, saved_states)


def _scan_operator(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Same as `selective_scan`, as one operator of a graph: unrolled, each token would have nodes of its own.

    The operator is private in PyTorch; tests/networks/test_graphs.py says when it changes. ONNX has one like it. Its
    public front, `torch._higher_order_ops.scan`, does the same after a compilation of seconds for each block.
    """
    from torch._higher_order_ops.scan import scan_op

    def step(state: Tensor, drive: Tensor, delta: Tensor, b: Tensor, c: Tensor, decay: Tensor) -> list[Tensor]:
        """Map (b, d, n) and a token's (b, d), (b, d), (b, n), (b, n) to the next state and y (b, d)."""
        state = torch.exp(delta.unsqueeze(2) * decay) * state + drive.unsqueeze(2) * b.unsqueeze(1)
        return [state, torch.matmul(state, c.unsqueeze(2)).squeeze(2)]

    start = u.new_zeros(u.shape[0], A.shape[0], A.shape[1])
    tokens = [tensor.transpose(0, 1) for tensor in (delta * u, delta, B, C)]
    _, y = scan_op(step, [start], tokens, (A,))
    return y.transpose(0, 1) + D * u


@cache
def _scripted_loop() -> Callable[..., Tensor]:
    """The textbook loop in TorchScript, which a trace keeps as a loop."""
    return torch.jit.script(selective_scan_loop)


def rows_per_tile(device: torch.device, states: int, channels: int) -> int:
    """How many sequences are walked together."""
    budget = CPU_TILE if device.type == "cpu" else CUDA_TILE
    return max(1, budget // (CHUNK * states * channels))


def _advance(
    start: Tensor, delta: Tensor, drive: Tensor, B: Tensor, log2_decay: Tensor, gains: Tensor, states: Tensor
) -> Tensor:
    """Fill `gains` exp(delta A) and `states` h, both (r, k, n, d), for one chunk; return its last state."""
    # exp2 of a pre-scaled exponent: exp itself goes through a library call that is several times slower
    torch.mul(delta.unsqueeze(2), log2_decay, out=gains).exp2_()
    torch.mul(drive.unsqueeze(2), B.unsqueeze(3), out=states)
    previous = start
    for gain, state in zip(gains.unbind(1), states.unbind(1), strict=True):
        previous = state.addcmul_(gain, previous)
    return previous


def _walk(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and the state before each chunk (b, chunks, n, d)."""
    b, length, d = u.shape
    n = A.shape[1]
    log2_decay = (A.t() * math.log2(math.e)).contiguous()  # (n, d)
    drive = delta * u
    tile = min(b, rows_per_tile(u.device, n, d))
    starts = u.new_zeros(b, math.ceil(length / CHUNK), n, d)  # state before each chunk
    gains_buffer, states_buffer = u.new_empty(2, tile, CHUNK, n, d)
    y = torch.empty_like(u)
    for first in range(0, b, tile):
        rows = slice(first, min(first + tile, b))
        for chunk, t in enumerate(range(0, length, CHUNK)):
            at = (rows, slice(t, min(t + CHUNK, length)))
            r, k, _ = u[at].shape
            gains, states = gains_buffer[:r, :k], states_buffer[:r, :k]
            last = _advance(starts[rows, chunk], delta[at], drive[at], B[at], log2_decay, gains, states)
            if chunk + 1 < starts.shape[1]:
                starts[rows, chunk + 1] = last
            y[at] = torch.matmul(C[at].unsqueeze(2), states).squeeze(2)  # (r, k, 1, n) @ (r, k, n, d)
    return y.addcmul_(D, u), starts


def _walk_back(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, grad_y: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C and D."""
    b, length, d = u.shape
    n = A.shape[1]
    decay = A.t().contiguous()  # (n, d)
    log2_decay = decay * math.log2(math.e)
    drive = delta * u
    grad_y = grad_y.contiguous()
    grad_drive, grad_delta = torch.empty_like(u), torch.empty_like(u)
    grad_decay = torch.zeros_like(decay)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    tile = min(b, rows_per_tile(u.device, n, d))
    gains_buffer, states_buffer, grads_buffer = u.new_empty(3, tile, CHUNK, n, d)
    for first in range(0, b, tile):
        rows = slice(first, min(first + tile, b))
        carry = u.new_zeros(rows.stop - first, n, d)  # dL/dh of the chunk's last token, from later tokens
        for chunk in reversed(range(starts.shape[1])):
            at = (rows, slice(chunk * CHUNK, min((chunk + 1) * CHUNK, length)))
            r, k, _ = u[at].shape
            gains, states, grads = gains_buffer[:r, :k], states_buffer[:r, :k], grads_buffer[:r, :k]
            start = starts[rows, chunk]
            _advance(start, delta[at], drive[at], B[at], log2_decay, gains, states)
            torch.mul(grad_y[at].unsqueeze(2), C[at].unsqueeze(3), out=grads)
            carry = _retreat(carry, gains, grads)
            grad_C[at] = torch.matmul(grad_y[at].unsqueeze(2), states.transpose(2, 3)).squeeze(2)
            grad_B[at] = torch.matmul(drive[at].unsqueeze(2), grads.transpose(2, 3)).squeeze(2)
            grad_drive[at] = torch.matmul(B[at].unsqueeze(2), grads).squeeze(2)
            # d h[t] / d (delta[t] A) = gain[t] h[t-1]
            grad_exponent = gains.mul_(grads)
            grad_exponent[:, 0].mul_(start)  # `*=` would also copy the slice onto itself
            grad_exponent[:, 1:].mul_(states[:, :-1])
            grad_delta[at] = torch.mul(grad_exponent, decay, out=states).sum(2)
            grad_decay += torch.mul(grad_exponent, delta[at].unsqueeze(2), out=states).sum((0, 1))
    grad_delta += grad_drive * u
    grad_u = (grad_drive * delta).addcmul_(D, grad_y)
    return grad_u, grad_delta, grad_decay.t(), grad_B, grad_C, (grad_y * u).sum((0, 1))


def _retreat(carry: Tensor, gains: Tensor, grads: Tensor) -> Tensor:
    """Turn `grads` C[t] dL/dy[t] into dL/dh[t] in place, last token first; return what the chunk before gets."""
    gain, grad = gains.unbind(1), grads.unbind(1)
    grad[-1].add_(carry)
    for t in reversed(range(len(grad) - 1)):
        grad[t].addcmul_(gain[t + 1], grad[t + 1])
    return gain[0] * grad[0]


def _walks(*tensors: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]:
    """The walks forward and back: those in C where they are installed and fit, else those above."""
    return (compiled.walk, compiled.walk_back) if compiled.fits(*tensors) else (_walk, _walk_back)


class _SelectiveScan(torch.autograd.Function):
    """The scan with its gradient; only the state before each chunk is stored."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        saved_states: list[Tensor] | None,
    ) -> Tensor:
        walk, ctx.walk_back = _walks(u, delta, A, B, C, D)
        if saved_states:
            starts, y = saved_states.pop(), saved_states.pop()
        else:
            y, starts = walk(u, delta, A, B, C, D)
            if saved_states is not None:
                saved_states.extend((y.detach(), starts))
        ctx.save_for_backward(u, delta, A, B, C, D, starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.walk_back(*ctx.saved_tensors, grad_y), None
