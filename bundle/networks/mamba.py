"""One Mamba layer (Gu and Dao, 2023, version 1), on any device."""

import logging
import math
import os
import subprocess
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bundle.errors import InputError
from bundle.networks import compiled, graphs
from bundle.networks.scan import selective_scan

logger = logging.getLogger(__name__)

STATES = 16  # hidden values per channel
KERNEL = 4  # tokens that the causal convolution sees
MIN_STEP, MAX_STEP = 1e-3, 1e-1  # range of the step sizes at the start of training

CHOICE = "BRAIN_FMRI_CUDA_SCAN"  # environment variable: one of ON_CUDA
UNUSABLE = (ImportError, OSError, RuntimeError, subprocess.SubprocessError)  # what a machine lacks, in all its forms

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor] | None], Tensor]


class Kernels(NamedTuple):
    """What runs between the matrix products of a window block.

    Attributes:
        convolve: (x, weight, bias) to the SiLU of `_CausalConv`.
        scan: (u, step, A, B, C, D, gate, saved_states) to `selective_scan` with the softplus of the steps, times the
            SiLU of the gate.
        norm: (layer, x, added) to x + added, or x for None, and its LayerNorm.
        plain: the scan is `selective_scan`. Others cannot use `saved_states`: it stays empty, and checkpointing runs
            them again.
    """

    convolve: Callable[..., Tensor]
    scan: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor] | None], Tensor]
    norm: Callable[[nn.LayerNorm, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    plain: bool


class Mamba(nn.Module):
    """Mix the tokens of each sequence, in their order; every token sees itself and those before it.

    Initial values are those of the mamba-ssm package: decay rates -1 to -16 in every channel, skip weights 1,
    step sizes log-uniform in [0.001, 0.1].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = 2 * channels
        self.step_rank = math.ceil(channels / 16)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, KERNEL, groups=inner)  # for its parameters; `_CausalConv` runs them
        self.x_proj = nn.Linear(inner, self.step_rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(self.step_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, STATES + 1).float().log().repeat(inner, 1))  # (d, n)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        with torch.no_grad():
            steps = torch.exp(torch.empty(inner).uniform_(math.log(MIN_STEP), math.log(MAX_STEP)))
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(self, tokens: Tensor, saved_states: list[Tensor] | None = None) -> Tensor:
        """Map (b, l, c) to (b, l, c); `saved_states` as in `selective_scan`."""
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)  # each (b, l, d), d = 2 c
        kernels = kernels_for(x.device.type)
        x = kernels.convolve(x, self.conv1d.weight, self.conv1d.bias)
        step, b, c = self.x_proj(x).split([self.step_rank, STATES, STATES], dim=-1)
        step = self.dt_proj(step)
        return self.out_proj(kernels.scan(x, step, -torch.exp(self.A_log), b, c, self.D, gate, saved_states))


class _CausalConv(torch.autograd.Function):
    """Convolve every channel along the tokens by itself, each token with the KERNEL - 1 before it.

    Written as shifted products: convolutions want (b, d, l), which costs a copy each way, and the gradient of one
    by single channels is slow, on a CPU (measured) as on a GPU (pytorch/pytorch issues 75747 and 192902).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, padded, taps = _convolved(x, weight, bias)
        ctx.save_for_backward(padded, taps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, taps = ctx.saved_tensors
        length = grad_y.shape[1]
        grad_y = grad_y.to(taps.dtype)
        grad_padded, grad_taps = torch.zeros_like(padded, dtype=taps.dtype), torch.empty_like(taps)
        for k in range(KERNEL):
            grad_padded[:, k : k + length].addcmul_(grad_y, taps[k])
            grad_taps[k] = (grad_y * padded[:, k : k + length]).sum((0, 1))
        grad_x = grad_padded[:, KERNEL - 1 :].to(padded.dtype)
        return grad_x, grad_taps.t().unsqueeze(1), grad_y.sum((0, 1))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map x (b, l, d) to the same shape and type; weight (d, 1, k) and bias (d,) as `nn.Conv1d` has them.

    Returns:
        The result, and what its gradient needs: x padded in front (b, k - 1 + l, d), and the taps (k, d).
    """
    length = x.shape[1]
    taps = weight[:, 0].t().contiguous()
    padded = functional.pad(x, (0, 0, KERNEL - 1, 0))
    y = torch.addcmul(bias, padded[:, :length], taps[0])  # in the weights' type, also under autocast
    for k in range(1, KERNEL):
        y.addcmul_(padded[:, k : k + length], taps[k])
    return y.to(x.dtype), padded, taps


def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if graphs.gradient_needed(x, weight, bias):
        return _CausalConv.apply(x, weight, bias)
    return _convolved(x, weight, bias)[0]


def around(scan: Scan) -> Kernels:
    """PyTorch's convolution, softplus and gate around a selective scan."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.silu(_causal_conv(x, weight, bias))

    def gated(
        u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, gate: Tensor, saved: list[Tensor] | None
    ) -> Tensor:
        return scan(u, functional.softplus(step), a, b, c, d, saved) * functional.silu(gate)

    def norm(layer: nn.LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x if added is None else x + added
        return x, layer(x)

    return Kernels(convolve, gated, norm, scan is selective_scan)


def _pytorch() -> Kernels:
    return around(selective_scan)


def _triton() -> Kernels:
    """Our kernels; a network that is traced, exported or compiled runs in PyTorch, as its graph would not see them."""
    from bundle.networks import triton_norm, triton_scan

    triton_scan.try_out(torch.device("cuda"))
    plain = _pytorch()

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        way = plain.convolve if compiled.in_graph(x) else triton_scan.convolve
        return way(x, weight, bias)

    def gated(
        u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, gate: Tensor, saved: list[Tensor] | None
    ) -> Tensor:
        if compiled.in_graph(u):
            return plain.scan(u, step, a, b, c, d, gate, saved)
        return triton_scan.gated_scan(u, step, a, b, c, d, gate)

    def norm(layer: nn.LayerNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        if compiled.in_graph(x):
            return plain.norm(layer, x, added)
        return triton_norm.residual_norm(x, added, layer.weight, layer.bias, layer.eps)

    return Kernels(convolve, gated, norm, plain=False)


def _mamba_ssm() -> Kernels:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def fused_scan(
        u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, _: list[Tensor] | None = None
    ) -> Tensor:
        """`selective_scan` through mamba-ssm's kernel, which wants time last, (b, d, l) and (b, n, l)."""
        u, delta, b, c = (tensor.float().transpose(1, 2).contiguous() for tensor in (u, delta, b, c))
        return selective_scan_fn(u, delta, a.float(), b, c, d.float()).transpose(1, 2)

    return around(fused_scan)


ON_CUDA: dict[str, Callable[[], Kernels]] = {"triton": _triton, "mamba-ssm": _mamba_ssm, "pytorch": _pytorch}


@cache
def kernels_for(device: str) -> Kernels:
    """Choose the kernels for a type of device ("cpu", "cuda", ...), once, and say which run and why.

    On CUDA that is the first of ON_CUDA which works here, or the one that the environment variable CHOICE names. Else
    it is `selective_scan`, which on a CPU walks in C where that is installed (`bundle.networks.compiled`).

    Raises:
        InputError: CHOICE names none of them, or one that does not work here.
    """
    if device != "cuda":
        way = "compiled C" if device == "cpu" and compiled.library() is not None else "plain PyTorch"
        logger.info("selective scan: %s on %s", way, device)
        return _pytorch()
    chosen = os.environ.get(CHOICE)
    if chosen is not None:
        if chosen not in ON_CUDA:
            raise InputError(f"{CHOICE} must be one of {', '.join(ON_CUDA)}, not {chosen!r}")
        try:
            kernels = ON_CUDA[chosen]()
        except UNUSABLE as error:
            raise InputError(f"{CHOICE} is {chosen}, which does not work here: {error}; unset it") from error
        logger.info("selective scan: %s on cuda, as %s says", chosen, CHOICE)
        return kernels
    reasons, level = "", logging.INFO
    for name, make in ON_CUDA.items():
        try:
            kernels = make()
        except UNUSABLE as error:
            reasons += f"{', and' if reasons else ', as'} {name} does not work here: {error}"
            level = level if isinstance(error, ModuleNotFoundError) else logging.WARNING
        else:
            break
    logger.log(level, "selective scan: %s on cuda%s", name, reasons)
    return kernels
