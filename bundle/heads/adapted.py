"""Few weights beside a frozen encoder that is otherwise left as it is: low-rank updates, or prompts."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bundle.errors import InputError
from bundle.heads.mean import Classifier
from bundle.networks.mamba import Mamba
from bundle.networks.swin_mamba import SwinMambaEncoder, WindowBlock

SCALE = 2.0


class AdaptedClassifier(Classifier):
    """Score each clip as `Classifier` does, by an encoder that small additions, trained along, adapt to the task.

    Its own weights stay identical to the bit, so that a state dict holds it as it was pretrained, and the additions
    beside it.

    Args:
        freeze: must be True: the encoder itself is not trained.
        outputs: numbers per clip, see `bundle.tasks.task.Task`.
        hidden: units of a hidden layer of the head, see `Classifier`.
        rank: of the low-rank updates of each block's `in_proj`, `out_proj` and MLP; 0: none. See `LowRank`.
        prompts: number of learnt tokens that each block's Mamba reads before those of a window; 0: none. See `Prompts`.
        **encoder: the arguments of `SwinMambaEncoder`.

    Raises:
        InputError: the encoder is to be trained, or nothing would adapt it.
    """

    def __init__(
        self,
        freeze: bool = True,
        outputs: int = 1,
        hidden: int | None = None,
        rank: int = 0,
        prompts: int = 0,
        **encoder: Any,
    ) -> None:
        super().__init__(freeze, outputs, hidden, **encoder)
        if not freeze:
            raise InputError("network_def#freeze must be true: additions are trained beside an encoder that is kept")
        if min(rank, prompts) < 0 or rank == prompts == 0:
            raise InputError(f"rank or prompts must be 1 or more, not {rank} and {prompts}")
        self.norm.momentum = 0.1  # what adapts the encoder lets its features drift
        self.updates = low_rank_updates(self.encoder, rank) if rank else nn.ModuleDict()
        self.prompts = prompts_of(self.encoder, prompts) if prompts else nn.ModuleDict()

    def features(self, image: Tensor) -> Tensor:
        """Map images (B, 1, X, Y, Z, T) to the mean over their tokens (B, c), with gradients for what is trained."""
        return self.encoder(image).mean(dim=(2, 3, 4, 5))


class LowRank(nn.Module):
    """A low-rank update of a linear layer: its result gains scale * up(down(x)).

    This is LoRA (Hu et al. 2021, arXiv 2106.09685). `up` begins at zero, so that the encoder begins as it was
    pretrained. The scale is the paper's alpha / rank, 2.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map what the layer is given (..., in) to what is added (..., out)."""
        return SCALE * self.up(self.down(x))


def low_rank_updates(encoder: SwinMambaEncoder, rank: int) -> nn.ModuleDict:
    """Updates of the linear layers of each block's Mamba and MLP, which are in effect from now on."""
    updates = nn.ModuleDict()
    for name, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("in_proj", "out_proj", "mlp.0", "mlp.2")):
            update = LowRank(layer, rank)
            layer.register_forward_hook(partial(_add, update))
            updates[name.replace(".", "_")] = update
    return updates


def _add(update: LowRank, _: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
    return result + update(given[0])


class Prompts(nn.Module):
    """Learnt tokens (p, c) that a block's Mamba reads before the tokens of every window, and whose results are dropped.

    As a scan carries its state on, they say how the window is to be read: the task prompts of arXiv 2506.11167, in
    every block, and for Mamba in front.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, channels))
        nn.init.trunc_normal_(self.tokens, std=0.02)


def prompts_of(encoder: SwinMambaEncoder, count: int) -> nn.ModuleDict:
    """Prompts of every block, which are in effect from now on."""
    found = nn.ModuleDict()
    for name, block in encoder.named_modules():
        if isinstance(block, WindowBlock):
            prompts = Prompts(block.norm1.normalized_shape[0], count)
            block.mamba.register_forward_pre_hook(partial(_before, prompts))
            block.mamba.register_forward_hook(partial(_after, prompts))
            found[name.replace(".", "_")] = prompts
    return found


def _before(prompts: Prompts, _: Mamba, given: tuple[Any, ...]) -> tuple[Any, ...]:
    tokens, *rest = given  # (windows, l, c)
    return torch.cat([prompts.tokens.to(tokens).expand(tokens.shape[0], -1, -1), tokens], dim=1), *rest


def _after(prompts: Prompts, _: Mamba, given: tuple[Any, ...], result: Tensor) -> Tensor:
    return result[:, len(prompts.tokens) :]
