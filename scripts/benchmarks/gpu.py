"""Training throughput: the one command for a machine with a GPU."""

import logging

import torch

from bundle.errors import InputError
from bundle.networks import mamba
from bundle.networks.mamba import Kernels
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.scan import selective_scan
from scripts.benchmarks.cases import FULL, QUICK, training_step
from scripts.benchmarks.measure import GIB, kernels_with, machine, markdown, measure

logger = logging.getLogger(__name__)

HEADER = ["scan", "batch", "options", "clips/s", "median step", "spread (IQR)", "peak memory", "parity with float32"]


def gpu(device: str = "cuda", quick: bool = False, batches: tuple[int, ...] = (8, 24), repeats: int = 10) -> str:
    """Clips/s and memory of MAE training in bf16 AMP, for every scan that works here.

    Args:
        device: "cuda"; "cpu" checks the command itself.
        quick: tiny networks.
        batches: clips per step.
        repeats: timed steps of each case.

    Raises:
        InputError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch sees no CUDA device; run this where there is one, or give --device cpu --quick.")
    size = QUICK if quick else FULL
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32; matrix products leave TF32 out anyway
    rows = []
    for name, kernels in working(device).items():
        difference = _parity(size, device, kernels)
        for batch in batches:
            for options in ({}, {"checkpointing": True}, {"skip_background": True}):
                rows.append([*_row(name, kernels, batch, size, options, device, repeats), difference])
    return machine(device) + "\n\n" + markdown(HEADER, rows)


def working(device: str) -> dict[str, Kernels]:
    """The kernels that work on a type of device; the log says why others do not, and no row may bear their names."""
    found = {}
    for name in mamba.ON_CUDA if device == "cuda" else ("pytorch",):
        try:
            found[name] = mamba.ON_CUDA[name]()
        except mamba.UNUSABLE as error:
            logger.warning("no rows for %s, which does not work here: %s", name, error)
    return found


def _row(name: str, kernels: Kernels, batch: int, size: dict, options: dict, device: str, repeats: int) -> list[str]:
    labels = [name, str(batch), ", ".join(options) or "none"]
    try:
        with kernels_with(kernels):
            step = training_step(MaskedAutoencoder(**size | options), batch, device, amp=True)
            found = measure(step, repeats, warmup=3, device=device)
    except torch.cuda.OutOfMemoryError:
        return [*labels, "out of memory", "", "", ""]
    return [
        *labels,
        f"{batch / found.median:.3g}",
        f"{found.median * 1e3:.4g} ms",
        f"{found.spread * 1e3:.2g} ms",
        f"{found.peak / GIB:.2f} GiB",
    ]


def _parity(size: dict, device: str, kernels: Kernels) -> str:
    """Relative difference of the first two losses between this scan in bf16 and the plain one in float32."""
    losses = []
    for path, amp in ((mamba.around(selective_scan), False), (kernels, True)):
        torch.manual_seed(0)
        with kernels_with(path):
            step = training_step(MaskedAutoencoder(**size), 1, device, amp)
            losses.append([step(), step()])
    pairs = zip(*losses, strict=True)
    return ", ".join(f"{abs(ours - exact) / exact:.1e}" for exact, ours in pairs)
