"""`python -m scripts.benchmarks.store_formats [--frames 400]`: how a prepared run could be stored, and what that costs.

Needs `pip install -e '.[bench]'`. Each format holds the same run, float16, in the brain only or dense; a clip is 20
frames from a random start. "Cold" is after the kernel has been told to forget the files.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import fire
import numpy as np
import safetensors
import zarr
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bundle.anatomy import grid
from scripts.benchmarks.measure import machine, markdown, say

CLIP = 20
Values = NDArray[np.float16]


def example(frames: int, dense: bool) -> Values:
    """A run's z-scores (T, V): mostly anatomy, with changes of 0.03 SD, as in real BOLD; background is one value."""
    rng = np.random.default_rng(0)
    voxels = np.flatnonzero(grid.mni_brain())
    anatomy = rng.normal(size=len(voxels)).astype(np.float32)
    rows = np.full((frames, int(np.prod(grid.SHAPE)) if dense else len(voxels)), -5, np.float16)
    for row in rows:
        values = anatomy + 0.03 * rng.standard_normal(len(voxels), dtype=np.float32)
        row[voxels if dense else slice(None)] = values
    return rows


def write_npy(path: Path, rows: Values) -> None:
    """NumPy's own format."""
    np.save(path, rows)


def read_npy(path: Path, start: int) -> Values:
    """Through a memory map."""
    return np.array(np.load(path, mmap_mode="r")[start : start + CLIP])


def write_zarr(path: Path, rows: Values) -> None:
    """Zarr 3 with its default compression (zstd), a chunk per clip."""
    array = zarr.create_array(str(path), shape=rows.shape, chunks=(CLIP, rows.shape[1]), dtype=rows.dtype)
    array[:] = rows


def read_zarr(path: Path, start: int) -> Values:
    """Decompresses the two chunks that a clip touches."""
    return np.asarray(zarr.open_array(str(path), mode="r")[start : start + CLIP])


def write_blosc2(path: Path, rows: Values) -> None:
    """Blosc2's array with byte shuffling and zstd, a chunk per clip."""
    blosc2.asarray(rows, urlpath=str(path), chunks=(CLIP, rows.shape[1]), mode="w")


def read_blosc2(path: Path, start: int) -> Values:
    """Decompresses the blocks that a clip touches."""
    return np.asarray(blosc2.open(str(path), mode="r")[start : start + CLIP])


def write_safetensors(path: Path, rows: Values) -> None:
    """One tensor."""
    save_file({"frames": rows}, str(path))


def read_safetensors(path: Path, start: int) -> Values:
    """A slice of the tensor."""
    with safetensors.safe_open(str(path), "numpy") as file:
        return np.array(file.get_slice("frames")[start : start + CLIP])


FORMATS: dict[str, tuple[Callable[[Path, Values], None], Callable[[Path, int], Values]]] = {
    "npy": (write_npy, read_npy),
    "zarr": (write_zarr, read_zarr),
    "b2nd": (write_blosc2, read_blosc2),
    "safetensors": (write_safetensors, read_safetensors),
}


def forget(path: Path) -> None:
    """Write a file, or all in a folder, to the disk and drop them from the kernel's cache (Linux)."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(frames: int = 400, reads: int = 20) -> None:
    """Measure every format and print the table.

    Args:
        frames: of the run.
        reads: clips per latency, of which the median is given.
    """
    lines = []
    for dense in (False, True):
        rows = example(frames, dense)
        starts = np.random.default_rng(0).integers(0, frames - CLIP, reads).tolist()
        for name, (write, read) in FORMATS.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"run.{name}"
                written = _timed(lambda write=write, path=path, rows=rows: write(path, rows))  # type: ignore[misc]
                assert np.array_equal(read(path, starts[0]), rows[starts[0] : starts[0] + CLIP])
                cold, warm = [], []
                for start in starts:
                    forget(path)
                    cold.append(_timed(lambda read=read, path=path, start=start: read(path, start)))  # type: ignore[misc]
                    warm.append(_timed(lambda read=read, path=path, start=start: read(path, start)))  # type: ignore[misc]
                size = f"{_size(path) / 2**20:.0f} MiB"
            times = [f"{statistics.median(values) * 1e3:.1f} ms" for values in (cold, warm)]
            lines.append([f"{name}, {'dense' if dense else 'in the brain'}", size, f"{written:.2f} s", *times])
    header = ["format", "size", "write", "clip, cold", "clip, warm"]
    say(f"{frames} frames, clips of {CLIP}. {machine()}\n\n{markdown(header, lines)}")


if __name__ == "__main__":
    fire.Fire(measure, name="scripts.benchmarks.store_formats")
