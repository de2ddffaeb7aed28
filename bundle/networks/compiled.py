"""The two walks of the selective scan in C: an optional extra for float32 on a CPU.

`compiled_scan/` beside this file is a small distribution of its own. From a clone, where gcc is,

    pip install ./bundle/networks/compiled_scan

builds it for the machine at hand. Nothing is built at import; without it `bundle.networks.scan` runs in plain
PyTorch. Both ways give the same results up to rounding, so weights and checkpoints go from one to the other. C
gives the same bits in every run, whatever the number of threads.
"""

# flake8: noqa: N803 - A, B, C and D are the names of the paper

import ctypes
import importlib.util
import logging
import math
from functools import cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

logger = logging.getLogger(__name__)

PACKAGE = "brain_fmri_compiled_scan"
VERSION, CHUNK, STATES = 1, 16, 16  # as in scan.c; CHUNK: tokens between two stored states


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled scan, once; None where it is not installed or, with a warning, cannot be used."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    again = "install bundle/networks/compiled_scan again"
    try:
        found = ctypes.CDLL(spec.origin)
        version = ctypes.c_int.in_dll(found, "compiled_scan_version").value
    except (OSError, ValueError) as error:
        logger.warning("the compiled scan cannot be loaded: %s; %s", error, again)
        return None
    if version != VERSION:
        logger.warning("the compiled scan %s is of version %d, not %d; %s", spec.origin, version, VERSION, again)
        return None
    for function, arrays in ((found.compiled_scan_walk, 8), (found.compiled_scan_walk_back, 14)):
        function.argtypes = [ctypes.c_int, *3 * [ctypes.c_int64], *arrays * [ctypes.c_void_p]]
        function.restype = None
    return found


def in_graph(tensor: Tensor) -> bool:
    """Whether a network is being traced, exported or compiled, or runs on fake tensors, which have no memory.

    The graph would not see what runs outside of PyTorch.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(tensor, FakeTensor)


def fits(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> bool:
    """Whether the walks here can be used: installed, float32 on a CPU, STATES hidden values, matching shapes.

    Nor can they where `in_graph` is true.
    """
    if in_graph(u) or library() is None or u.numel() == 0:
        return False
    b, length, d = u.shape
    weights = (b, length, STATES)
    shapes = (u.shape, u.shape, (d, STATES), weights, weights, (d,))
    return all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.shape == shape
        for tensor, shape in zip((u, delta, A, B, C, D), shapes, strict=True)
    )


def walk(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and the state before each chunk (b, chunks, n, d), for arguments that `fits` accepts."""
    b, length, d = u.shape
    inputs = [tensor.contiguous() for tensor in (u, delta, A.t() * math.log2(math.e), B, C, D)]
    y, starts = u.new_empty(b, length, d), u.new_empty(b, math.ceil(length / CHUNK), STATES, d)
    _run("compiled_scan_walk", u.shape, [*inputs, y, starts])
    return y, starts


def walk_back(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, grad_y: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C and D."""
    b, length, d = u.shape
    decay = A.t().contiguous()  # (n, d)
    tensors = (u, delta, decay, decay * math.log2(math.e), B, C, D, starts, grad_y)
    inputs = [tensor.contiguous() for tensor in tensors]
    grad_u, grad_delta = u.new_empty(b, length, d), u.new_empty(b, length, d)
    tile = ctypes.c_int.in_dll(library(), "compiled_scan_tile").value  # type: ignore[arg-type]
    # in parts, each of which is written by one thread; the sum is left in the first
    grad_decay_D = u.new_empty(b, STATES + 1, d)  # noqa: N806
    grad_B, grad_C = u.new_empty(2, math.ceil(d / tile), b, length, STATES)  # noqa: N806
    _run("compiled_scan_walk_back", u.shape, [*inputs, grad_u, grad_delta, grad_decay_D, grad_B, grad_C])
    total = grad_decay_D[0].clone()  # lets go of the parts
    return grad_u, grad_delta, total[:STATES].t(), grad_B[0], grad_C[0], total[STATES]


def _run(name: str, shape: torch.Size, tensors: list[Tensor]) -> None:
    """Call a function of the library; every array must be dense, and lives at least as long as `tensors`."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    getattr(library(), name)(torch.get_num_threads(), *shape, *(tensor.data_ptr() for tensor in tensors))
