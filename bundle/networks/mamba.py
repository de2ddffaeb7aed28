"""One Mamba layer (Gu and Dao, 2023, version 1), on any device."""

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bundle.networks import compiled
from bundle.networks.scan import selective_scan

logger = logging.getLogger(__name__)

STATES = 16  # hidden values per channel
KERNEL = 4  # tokens that the causal convolution sees
MIN_STEP, MAX_STEP = 1e-3, 1e-1  # range of the step sizes at the start of training

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor] | None], Tensor]


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
        x = functional.silu(_CausalConv.apply(x, self.conv1d.weight, self.conv1d.bias))
        step, b, c = self.x_proj(x).split([self.step_rank, STATES, STATES], dim=-1)
        step = functional.softplus(self.dt_proj(step))
        y = scan_for(x.device.type)(x, step, -torch.exp(self.A_log), b, c, self.D, saved_states)
        return self.out_proj(y * functional.silu(gate))


class _CausalConv(torch.autograd.Function):
    """Convolve every channel along the tokens by itself, each token with the KERNEL - 1 before it.

    Written as shifted products: convolutions want (b, d, l), which costs a copy each way, and the gradient of one
    by single channels is slow, on a CPU (measured) as on a GPU (pytorch/pytorch issues 75747 and 192902).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Map x (b, l, d) to the same shape and type; weight (d, 1, k) and bias (d,) as `nn.Conv1d` has them."""
        length = x.shape[1]
        taps = weight[:, 0].t().contiguous()  # (k, d)
        padded = functional.pad(x, (0, 0, KERNEL - 1, 0))
        ctx.save_for_backward(padded, taps)
        y = torch.addcmul(bias, padded[:, :length], taps[0])  # in the weights' type, also under autocast
        for k in range(1, KERNEL):
            y.addcmul_(padded[:, k : k + length], taps[k])
        return y.to(x.dtype)

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


@cache
def scan_for(device: str) -> Scan:
    """Choose the selective scan for a type of device ("cpu", "cuda", ...), once, and say which one runs.

    mamba-ssm's fused kernel is used on CUDA where the package can be imported, else `selective_scan`, which on a CPU
    walks in C where that is installed (`bundle.networks.compiled`).
    """
    if device != "cuda":
        way = "compiled C" if device == "cpu" and compiled.library() is not None else "plain PyTorch"
        logger.info("selective scan: %s on %s", way, device)
        return selective_scan
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ModuleNotFoundError as error:
        logger.info("selective scan: plain PyTorch on cuda, as %s is not installed", error.name)
        return selective_scan
    except (ImportError, OSError) as error:  # built for another PyTorch or CUDA
        logger.warning("selective scan: plain PyTorch on cuda, as mamba-ssm cannot be loaded: %s", error)
        return selective_scan
    logger.info("selective scan: fused kernel of mamba-ssm on cuda")

    def fused_scan(
        u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, saved_states: list[Tensor] | None = None
    ) -> Tensor:
        """`selective_scan` through the fused kernel, which wants time last, (b, d, l) and (b, n, l).

        The kernel cannot use `saved_states`: it stays empty, and checkpointing runs the kernel again.
        """
        u, delta, b, c = (tensor.float().transpose(1, 2).contiguous() for tensor in (u, delta, b, c))
        return selective_scan_fn(u, delta, a.float(), b, c, d.float()).transpose(1, 2)

    return fused_scan
