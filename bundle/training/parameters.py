"""Which parameters are trained, and how fast."""

import logging
import re
from typing import Any

from torch import nn

from bundle.errors import InputError

logger = logging.getLogger(__name__)


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that get gradients; how many there are is logged."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    count, total = (sum(p.numel() for p in which) for which in (parameters, network.parameters()))
    logger.info("%s: %d of %d parameters are trained", type(network).__name__, count, total)
    return parameters


def by_depth(network: nn.Module, learning_rate: float, decay: float) -> list[dict[str, Any]]:
    """Groups of the trained parameters, slower the nearer they are to the image: for fine-tuning.

    The head learns at `learning_rate`, each layer of the encoder at `decay` times the rate of the one above it
    (layer-wise decay, as masked autoencoders are fine-tuned: Bao et al. 2022, arXiv 2106.08254; He et al. 2022, arXiv
    2111.06377). Layers, from below: the embedding of patches; then, stage by stage, the embeddings of place and time,
    each block, and the merging of patches.

    Args:
        network: a head with its `encoder`.
        learning_rate: of the head.
        decay: above 0, at most 1.

    Raises:
        InputError: another decay, or the encoder is frozen.
    """
    if not 0 < decay <= 1:
        raise InputError(f"layer_decay must be above 0 and at most 1, not {decay}")
    trained(network)
    layers: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(_depth(name), []).append(parameter)
    if len(layers) < 2:
        raise InputError("fine-tuning trains the encoder too; set freeze_encoder false")
    order = sorted(layers, reverse=True)
    return [{"params": layers[key], "lr": learning_rate * decay**place} for place, key in enumerate(order)]


def _depth(name: str) -> tuple[int, ...]:
    """Where a parameter lies, so that what is above comes later."""
    if match := re.match(r"encoder\.stages\.(\d+)\.(?:stack\.blocks\.(\d+)|(place|time|merge))", name):
        stage, block, other = match.groups()
        inside = int(block) + 1 if block is not None else 0 if other in ("place", "time") else 10**6
        return 1 + int(stage), inside
    return (0,) if name.startswith("encoder.") else (10**6,)
