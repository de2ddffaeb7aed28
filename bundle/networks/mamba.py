"""One Mamba layer (Gu and Dao, 2023, version 1), on any device."""

import logging
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

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
        self.expand = nn.Linear(channels, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, KERNEL, groups=inner, padding=KERNEL - 1)
        self.select = nn.Linear(inner, self.step_rank + 2 * STATES, bias=False)
        self.step = nn.Linear(self.step_rank, inner)
        self.log_decay = nn.Parameter(torch.arange(1, STATES + 1).float().log().repeat(inner, 1))  # (d, n)
        self.skip = nn.Parameter(torch.ones(inner))
        self.contract = nn.Linear(inner, channels, bias=False)
        nn.init.uniform_(self.step.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        with torch.no_grad():
            steps = torch.exp(torch.empty(inner).uniform_(math.log(MIN_STEP), math.log(MAX_STEP)))
            self.step.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(self, tokens: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Map (b, l, c) to (b, l, c); `kept` as in `selective_scan`."""
        length = tokens.shape[1]
        x, gate = self.expand(tokens).chunk(2, dim=-1)  # each (b, l, d), d = 2 c
        x = self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2)  # causal: the tail is padding
        x = functional.silu(x)
        step, b, c = self.select(x).split([self.step_rank, STATES, STATES], dim=-1)
        step = functional.softplus(self.step(step))
        y = scan_for(x.device.type)(x, step, -torch.exp(self.log_decay), b, c, self.skip, kept)
        return self.contract(y * functional.silu(gate))


@cache
def scan_for(device: str) -> Scan:
    """Choose the selective scan for a type of device ("cpu", "cuda", ...), once, and say which one runs.

    mamba-ssm's fused kernel is used on CUDA where the package can be imported, else `selective_scan`.
    """
    if device != "cuda":
        logger.info("selective scan: plain PyTorch on %s", device)
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
        u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, kept: list[Tensor] | None = None
    ) -> Tensor:
        """`selective_scan` through the fused kernel, which wants time last, (b, d, l) and (b, n, l).

        The kernel cannot use `kept`: it stays empty, and checkpointing runs the kernel again.
        """
        u, delta, b, c = (tensor.float().transpose(1, 2).contiguous() for tensor in (u, delta, b, c))
        return selective_scan_fn(u, delta, a.float(), b, c, d.float()).transpose(1, 2)

    return fused_scan
