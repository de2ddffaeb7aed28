"""Training throughput, and what a step is spent on: the commands for a machine with a GPU."""

import logging
import re

import torch
from torch.profiler import ProfilerActivity

from bundle.errors import InputError
from bundle.networks import mamba
from bundle.networks.mamba import Kernels
from bundle.networks.masked_autoencoder import MaskedAutoencoder
from bundle.networks.scan import selective_scan
from scripts.benchmarks.cases import FULL, QUICK, training_step
from scripts.benchmarks.measure import GIB, kernels_with, machine, markdown, measure

logger = logging.getLogger(__name__)

HEADER = ["scan", "batch", "options", "clips/s", "median step", "spread (IQR)", "peak memory", "parity with float32"]
KINDS = {
    "scan, backward": "^walk_back",
    "scan, forward": "^walk",
    "convolution, backward": "^convolve_back",
    "convolution, forward": "^convolve",
    "matrix products": "gemm|nvjet|cutlass|xmma|splitk|gemv|mm$",
    "LayerNorm": "layer_norm|add_norm",
    "windows: gather": "index_select|indexSelect|gather|scatter|index",
    "optimizer": "multi_tensor|adam",
    "sums": "reduce",
    "element by element, casts and copies": "elementwise|copy|cat|fill|memcpy|memset",
}
"""What a kernel of the GPU is for, by its name; the first that fits."""


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
    _require(device)
    size = QUICK if quick else FULL
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32; matrix products leave TF32 out anyway
    rows = []
    for name, kernels in working(device).items():
        difference = _parity(size, device, kernels)
        for batch in batches:
            for options in ({}, {"checkpointing": True}, {"skip_background": True}):
                rows.append([*_row(name, kernels, batch, size, options, device, repeats), difference])
    return machine(device) + "\n\n" + markdown(HEADER, rows)


def _require(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch sees no CUDA device; run this where there is one, or give --device cpu --quick.")


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


def profile(device: str = "cuda", quick: bool = False, batch: int = 8, steps: int = 5) -> str:
    """Tabulate which kernels the device spends a training step in, bf16 AMP, with the scan that is used by default.

    Args:
        device: "cuda"; "cpu" checks the command itself: there the kernels are PyTorch's operations.
        quick: a tiny network.
        batch: clips per step.
        steps: profiled, after three of warm-up.

    Raises:
        InputError: there is no such device.
    """
    _require(device)
    step = training_step(MaskedAutoencoder(**QUICK if quick else FULL), batch, device, amp=True)
    found = measure(step, steps, warmup=3, device=device)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
    spent, launches = dict.fromkeys([*KINDS, "other"], 0.0), dict.fromkeys([*KINDS, "other"], 0)
    for event in profiler.key_averages():
        seconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        kind = next((kind for kind, name in KINDS.items() if re.search(name, event.key, re.IGNORECASE)), "other")
        if seconds == 0:  # not the device's
            continue
        spent[kind] += seconds / 1e6 / steps
        launches[kind] += event.count // steps
    busy = sum(spent.values())
    rows = [
        [kind, f"{seconds * 1e3:.2f} ms", f"{100 * seconds / busy:.0f} %", str(launches[kind])]
        for kind, seconds in sorted(spent.items(), key=lambda item: -item[1])
        if launches[kind]
    ]
    rows.append(["all", f"{busy * 1e3:.2f} ms", "100 %", str(sum(launches.values()))])
    return (
        f"{machine(device)} Batch {batch}, bf16; a step takes {found.median * 1e3:.4g} ms by the clock.\n\n"
        + markdown(["kernels", "time per step", "share", "launches"], rows)
    )
