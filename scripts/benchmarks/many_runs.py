"""`python -m scripts.benchmarks many_runs [--runs 50000]`: what starting takes with so many runs, on a simulated store.

The runs' records are made up, their arrays are a few small files shared by hard links, and their source files are
empty and known as unchanged; one run more, which is real, is prepared. So this measures what grows with the number of
runs. Reading is measured on a few runs of the full size.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from monai.bundle import ConfigParser
from monai.data import Dataset

from bundle.anatomy import grid
from bundle.anatomy.atlas import load_atlas
from bundle.data.batches import loader
from bundle.data.splits import make_splits, save_splits
from bundle.data.transforms import ReadClipd
from bundle.files import SETTLED_S, config_file
from bundle.preparation import store as stored
from bundle.preparation.chain import load_preparation
from bundle.preparation.seen import fingerprint, source_stamps, write_seen
from bundle.preparation.sources import find_runs
from scripts.benchmarks.cases import synthetic_store
from scripts.benchmarks.measure import GIB, machine, markdown

FRAMES, VOXELS = 410, 1000
"""Of a simulated run: 20 clips of 20 frames, and few voxels."""
LINKS = 20_000  # of one file: ext4 allows 65,000
SMALL = {"embed_dim": 4, "depths": [1, 1]}  # of the network that would be pretrained


def many_runs(runs: int = 50_000, folder: str | None = None, quick: bool = False) -> str:
    """Simulate a store and measure, each step in a process of its own.

    Args:
        runs: how many.
        folder: where the store is made, and removed again; None: a temporary folder. It takes three inodes per run.
        quick: 60 runs.
    """
    runs = 60 if quick else runs
    with tempfile.TemporaryDirectory(dir=folder) as made:
        place = Path(made)
        said = machine()
        rows = [["simulate the store (not a use of it)", *_in_a_process("simulate", place, runs)]]
        rows += [[name, *_in_a_process(step, place, runs)] for step, name in STEPS.items()]
        read = reading(place / "full", quick)
    title = f"{said} {runs:,} simulated runs, SYNTHETIC."
    return "\n\n".join([title, markdown(["step", "seconds", "CPU seconds", "peak memory"], rows), read])


STEPS = {
    "manifest": "write the manifest, all records read",
    "again": "write it again, nothing changed",
    "split": "make a split file",
    "nothing": "import the bundle, for comparison",
    "pretrain": "start pretraining, to its first batch",
    "alone": "prepare one run into an empty store",
    "prepare": "prepare again with that run more",
    "current": "prepare again, nothing changed",
}


def step(name: str, place: Path, runs: int) -> None:
    """Do one step in this process."""
    parameters = load_preparation()
    store, write = place / "store", (parameters.parameters(), parameters.parameters_hash)
    if name == "simulate":
        simulate(place, runs)
    elif name in ("manifest", "again"):
        stored.write_manifest(store, *write)
    elif name == "split":
        save_splits(make_splits(stored.read_index(store)["runs"]), place / "splits.json")
    elif name == "pretrain":
        first_batch(store, place / "splits.json", place / "output")
    elif name == "alone":
        _prepare(place / "one.tsv", place / "alone")
    elif name in ("prepare", "current"):
        _prepare(place / "all.tsv", store)


def _in_a_process(name: str, place: Path, runs: int) -> list[str]:
    code = (
        "import resource, sys, time; from pathlib import Path; from scripts.benchmarks.many_runs import step; "
        f"step({name!r}, Path({str(place)!r}), {runs}); "
        "print('TOOK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time())"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    peak, cpu = done.stdout.split("TOOK")[1].split()
    return [f"{seconds:.1f}", f"{float(cpu):.1f}", f"{int(peak) * 1024 / GIB:.2f} GiB"]


def simulate(place: Path, runs: int) -> None:
    """Write the simulated store, its table of runs (all.tsv, with one real run more) and one.tsv, of that run alone."""
    preparation, draw = load_preparation(), np.random.default_rng(0)
    parameters_hash = preparation.parameters_hash
    store, sources = place / "store", place / "sources"
    (store / "runs").mkdir(parents=True)
    sources.mkdir()
    atlas = load_atlas(preparation.atlas)
    rows = []
    for number in range(runs):
        name = f"sub-{number:06d}"
        (sources / f"{name}_bold.nii.gz").touch()
        site = number // 2 % (20 if runs > 1000 else 1)
        row = {"participant_id": name, "bold": sources / f"{name}_bold.nii.gz", "run_id": name, "site": f"site-{site}"}
        rows.append(row | {"diagnosis": number % 2, "age": float(draw.integers(80, 180)) / 10, "sex": "FM"[site % 2]})
    _real_run(place / "sub-more_bold.nii.gz")
    more = rows[0] | {"participant_id": "sub-more", "bold": place / "sub-more_bold.nii.gz", "run_id": "sub-more"}
    pd.DataFrame([more]).to_csv(place / "one.tsv", sep="\t", index=False)
    pd.DataFrame([*rows, more]).to_csv(place / "all.tsv", sep="\t", index=False)
    found = find_runs(place / "all.tsv")[:runs]
    masters = place / "masters"
    for number, run in enumerate(found):
        if number % LINKS == 0:
            shutil.rmtree(masters, ignore_errors=True)
            _arrays(masters, draw)
        folder = store / "runs" / run["run_id"]
        folder.mkdir()
        for file in masters.iterdir():
            os.link(file, folder / file.name)
        record = _record(run, parameters_hash, atlas, draw)
        (folder / "run.json").write_text(json.dumps(record))
    time.sleep(SETTLED_S + 1)
    records = stored.read_records(store)
    seen = {run["run_id"]: fingerprint(run, source_stamps(run), records[run["run_id"]], store) for run in found}
    assert all(seen.values())
    write_seen(store, seen)


def _arrays(folder: Path, draw: np.random.Generator) -> None:
    folder.mkdir()
    np.save(folder / "frames.npy", draw.standard_normal((FRAMES, VOXELS), dtype=np.float32).astype(np.float16))
    np.save(folder / "voxels.npy", np.flatnonzero(grid.mni_brain())[:VOXELS].astype(np.int32))
    np.save(folder / "moments.npy", np.ones((2, VOXELS)))
    (folder / "picture.webp").write_bytes(bytes(20_000))


def _record(run: dict[str, Any], parameters_hash: str, atlas: Any, draw: np.random.Generator) -> dict[str, Any]:
    """As `bundle.preparation.prepare` writes it, with made-up numbers."""
    return {
        **{key: run[key] for key in ("run_id", "participant_id", "site", "diagnosis", "participant")}, "mean_fd": None,
        "source": str(run["bold"]),
        "source_sha256": draw.bytes(32).hex(), "mask_sha256": draw.bytes(32).hex(), "confounds_sha256": None,
        "tr_in": 2.0, "tr_source": "header", "space": "MNI152", "parameters_hash": parameters_hash,
        "versions": dict.fromkeys(("numpy", "scipy", "nibabel", "nilearn", "monai", "torch"), "1.26.4"),
        "affine_in": grid.AFFINE.tolist(), "axcodes_in": "RAS", "shape_in": [97, 115, 97], "frames_in": 164,
        "tr": 0.8, "cleaning": None, "mask_source": str(run["bold"]).replace("bold", "mask"), "mni_overlap": 0.97,
        "frames": FRAMES, "voxels": VOXELS, "mean": 900.5, "sd": 250.25, "fill": -3.5,
        "coverage": {name: float(draw.uniform(0.9, 1)) for name in atlas.groups}, "coverage_atlas": atlas.sha256,
    }  # fmt: skip


def _real_run(path: Path) -> None:
    """Noise on a 4 mm grid in the MNI152 brain, 100 frames of 2 s."""
    brain = grid.mni_brain()[::2, ::2, ::2]
    data = np.random.default_rng(1).normal(1000, 50, (*brain.shape, 100)).astype(np.float32) * brain[..., None]
    image = nib.Nifti1Image(data, grid.AFFINE @ np.diag([2, 2, 2, 1]))
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 2.0
    nib.save(image, path)


def _prepare(table: Path, store: Path) -> None:
    from scripts.commands import prepare

    prepare(str(table), str(store))


def first_batch(store: Path, splits: Path, output: Path, workers: int = 2) -> None:
    """Make what configs/pretrain.json makes, with a small network, and read the first batch of training."""
    parser = ConfigParser(ConfigParser.load_config_file(config_file("pretrain")))
    parser.update({"dataset_dir": str(store), "splits_file": str(splits), "output_dir": str(output), **SMALL})
    parser.update({"num_workers": workers})
    parser.get_parsed_content("train#trainer")
    batch = next(iter(parser.get_parsed_content("train#dataloader")))
    assert len(batch) == parser["batch_size"]


def reading(folder: Path, quick: bool = False) -> str:
    """Count what one clip opens and reads at full size, and how long 100 clips/s wait for a loader of 8 processes."""
    listed = synthetic_store(folder, runs=4 if quick else 24, quick=quick)
    transform = ReadClipd(folder, random=True, seed=0)
    with _opened(folder) as opened:
        item = transform(listed[0])
    sizes = {name: item[name].nbytes for name in ("frames", "voxels")} | {"moments": 2 * item["moments"].nbytes}
    total = sum(sizes.values())
    of_each = ", ".join(f"{size / 2**20:.1f} MiB {name}" for name, size in sizes.items())
    lines = [f"A clip opens {len(opened)} files ({', '.join(opened)}) and reads {total / 2**20:.1f} MiB: {of_each}."]
    rows = []
    for workers in (0, 2, 8):
        for cold in (True, False):
            found = []
            for rate in (1e6, 100.0):
                if cold:
                    _forget(folder)
                found.append(_waiting(Dataset(listed, transform), workers, rate))
            cells = [f"{found[0][0]:.0f}", f"{found[1][0]:.0f}", f"{found[1][1]:.0%}"]
            rows.append([f"{workers}", "no" if cold else "yes", *cells])
    header = ["reading processes", "in the kernel's cache", "clips/s, nobody else", "before 100 clips/s", "waiting"]
    return "\n\n".join([*lines, markdown(header, rows)])


@contextmanager
def _opened(folder: Path) -> Iterator[list[str]]:
    """Within, gathers the names of files below a folder as they are opened, each time that they are."""
    names: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == "open" and str(arguments[0]).startswith(str(folder)):
            names.append(Path(arguments[0]).name)

    sys.addaudithook(watch)  # stays, there is no way to take one off
    yield names
    watching = False


def _waiting(dataset: Dataset, workers: int, rate: float, batch: int = 8) -> tuple[float, float]:
    """Clips/s of one epoch in random order before a network that takes `rate` of them, and the share that it waits.

    The network is a pause, in which the loader's processes read on, as they do beside a GPU. The first batch, for which
    the processes start, is left out.
    """
    batches = iter(loader(dataset, batch, shuffle=True, num_workers=workers))
    next(batches)
    clips, waited, start = 0, 0.0, time.perf_counter()
    end = start
    for items in batches:
        waited += time.perf_counter() - end
        time.sleep(len(items) / rate)
        clips += len(items)
        end = time.perf_counter()
    return clips / (end - start), waited / (end - start)


def _forget(folder: Path) -> None:
    """Write files to the disk and drop them from the kernel's cache (Linux)."""
    for file in folder.rglob("*.*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
