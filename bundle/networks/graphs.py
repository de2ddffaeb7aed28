"""How a network is computed where no gradient is needed, or where it is written down to be run elsewhere.

Our autograd functions save time and memory in training. No file format knows them, so these networks take plain
operations instead; what is written down holds no code of this repository.
"""

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether `torch.export` follows the network (not in its strict mode, which compiles it)."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def written_down() -> bool:
    """Whether `torch.export` or `torch.jit.trace` follows the network, to write down what it does."""
    return exporting() or torch.jit.is_tracing()


def gradient_needed(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked of what is computed from these tensors; of what is written down none is."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) and not written_down()
