"""Time and memory of a function, and tables of them in Markdown."""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self
from unittest import mock

import torch

from bundle.networks import compiled, mamba, scan, swin_mamba
from bundle.networks.mamba import Kernels
from bundle.networks.scan import selective_scan_loop

GIB = 2**30


@dataclass(frozen=True)
class Measurement:
    """What one case took.

    Attributes:
        seconds: each timed run.
        peak: most memory held while it ran, bytes: of the whole process on a CPU, of tensors on a GPU.
    """

    seconds: tuple[float, ...]
    peak: int

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range in seconds; 0 for a single run."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def measure(run: Callable[[], object], repeats: int, warmup: int = 1, device: str = "cpu") -> Measurement:
    """Run `warmup` times, then `repeats` timed times."""
    for _ in range(warmup):
        run()
    _start_peak(device)
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return Measurement(tuple(seconds), _peak(device))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _start_peak(device: str) -> None:
    """Give freed memory back and start the high-water mark anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts from the present size


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024  # kB


@contextmanager
def kernels_with(chosen: Kernels) -> Iterator[None]:
    """Within, networks run the given kernels, and recompute in their backward pass what goes with these."""
    with (
        mock.patch.object(mamba, "kernels_for", return_value=chosen),
        mock.patch.object(swin_mamba, "kernels_for", return_value=chosen),
    ):
        yield


@contextmanager
def scan_with(chosen: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within, networks run the given selective scan (u, delta, A, B, C, D, kept).

    With the published loop a block takes all its windows at once, as published; else as many as the cache holds.
    """

    def all_rows(*_: object) -> int:
        return sys.maxsize

    rows = all_rows if chosen is published_loop else swin_mamba.rows_per_tile
    with kernels_with(mamba.around(chosen)), mock.patch.object(swin_mamba, "rows_per_tile", rows):
        yield


@contextmanager
def compiled_scan(library: ctypes.CDLL | None) -> Iterator[None]:
    """Within, `selective_scan` walks in the given library (`compiled.library()`), or in plain PyTorch for None."""
    with mock.patch.object(compiled, "library", return_value=library):
        yield


def lean_loop(*arguments: torch.Tensor) -> torch.Tensor:
    """The textbook loop under plain autograd."""
    *tensors, _ = arguments  # the last is `kept`
    return selective_scan_loop(*tensors)


def published_loop(*arguments: torch.Tensor) -> torch.Tensor:
    """The loop as mamba-ssm's `selective_scan_ref` has it, under plain autograd.

    Gains and inputs come first, for all tokens, then one token after the other. Autograd through the slices is
    what makes it slow.
    """
    u, delta, decay, b, c, skip, _ = arguments
    gains = torch.exp(delta.unsqueeze(-1) * decay)  # (b, l, d, n)
    inputs = (delta * u).unsqueeze(-1) * b.unsqueeze(2)  # (b, l, d, n)
    state, outputs = torch.zeros_like(inputs[:, 0]), []
    for t in range(u.shape[1]):
        state = gains[:, t] * state + inputs[:, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, c[:, t]))
    return torch.stack(outputs, dim=1) + skip * u


class ScanTimer:
    """Within, adds up the time spent in `selective_scan`, forward and backward, as networks call it."""

    def __enter__(self) -> Self:
        self.seconds = 0.0
        self._patches = [
            mock.patch.object(scan._SelectiveScan, way, self._timed(getattr(scan._SelectiveScan, way)))
            for way in ("forward", "backward")
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _timed(self, function: Callable) -> Callable:
        def run(*arguments: object) -> object:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return run


def seconds_text(seconds: float) -> str:
    """Three figures, in ms below a second."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    lines = [" | ".join(header), " | ".join([":--"] + ["--:"] * (len(header) - 1))]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def machine(device: str = "cpu") -> str:
    """Say what ran: hardware, threads, load, versions, commit and date."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else platform.machine()
        hardware = f"{name}, {len(os.sched_getaffinity(0))} cores"
    return (
        f"{hardware}; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}; PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}; commit {_commit()}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    )


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "bundle", "scripts")
        return git("rev-parse", "--short", "HEAD").strip() + (" with changes" if changed.strip() else "")
    except (subprocess.CalledProcessError, FileNotFoundError):  # not a checkout, or no git
        return "unknown"


def say(text: str) -> None:
    """Print a result at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
