"""`python -m scripts.benchmarks.preparation [--frames 400]`: preparing one run, ours beside two other ways.

The run is a made-up field that is known at every place and time, stored LAS, 91 x 109 x 91 voxels of 2 mm whose
lattice lies half a voxel off the grid's, so that every value must be interpolated. Each way runs in a process of its
own; the error is that of what it stored, in the field's units, at random places in the brain and all its frames.

"published" follows the description of NeuroSTORM's preprocessing: index-space trilinear resampling of the whole
4D array to 2 mm, linear interpolation in time over the dense array, a crop about the middle to 96 voxels, z-scores,
one half-precision .pt file per frame. It is given the flip of x that its LAS grid needs.
"""

import json
import logging
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from nilearn.datasets import load_mni152_brain_mask
from nilearn.image import resample_img
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from torch.nn import functional

from bundle.anatomy import grid
from bundle.preparation import store
from bundle.preparation.prepare import prepare
from bundle.preparation.scaling import resample_tr, zscore
from scripts.benchmarks.measure import machine, markdown, say

TR, SLOPE = 2.0, 0.05
SHAPE = (91, 109, 91)
AFFINE = nib.affines.from_matvec(np.diag([-2.0, 2, 2]), [91, -125, -71])  # LAS; the box is at (90, -126, -72)
RUN, MASK = "run.nii.gz", "mask.nii.gz"


def field(places: NDArray, seconds: NDArray) -> NDArray[np.float64]:
    """The true values (T, V) at world places (V, 3), mm, and times (T,)."""
    x, y, z = places.T
    anatomy = 1000 + 300 * np.cos(x / 7) * np.cos(y / 8) * np.cos(z / 9)
    phase = 2 * np.pi * seconds[:, None] / 40
    return anatomy + 20 * (np.sin(phase) * np.cos(x / 10) + np.cos(phase) * np.sin(x / 10))


def make_run(folder: Path, frames: int) -> None:
    """Write the run (with noise of a few steps, so that it compresses like real data) and its brain mask."""
    template = load_mni152_brain_mask(resolution=2)
    brain = grid.nearest(np.asarray(template.dataobj) > 0, template.affine, AFFINE, SHAPE)
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), AFFINE), folder / MASK)
    places = nib.affines.apply_affine(AFFINE, np.argwhere(brain))
    rng = np.random.default_rng(0)
    data = np.zeros((*SHAPE, frames), np.int16, order="F")
    for number in range(frames):
        values = field(places, np.array([number * TR]))[0] / SLOPE
        data[brain, number] = np.round(values + rng.integers(-16, 17, len(values)))
    image = nib.Nifti1Image(data, AFFINE)
    image.set_sform(AFFINE, 4)
    image.set_qform(AFFINE, 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = TR
    image.header.set_slope_inter(SLOPE, 0)
    nib.save(image, folder / RUN)


def ours(folder: Path, out: Path, mask: bool = True) -> None:
    """This bundle's preparation, with its hashes and records."""
    run = {
        "run_id": "sub-01", "participant_id": "sub-01", "bold": folder / RUN, "mask": folder / MASK if mask else None,
        "confounds": None, "tr": None, "space": None, "site": "A", "diagnosis": 0, "participant": {},
    }  # fmt: skip
    assert prepare([run], out)["prepared"] == 1


def by_nilearn(folder: Path, out: Path) -> None:
    """Nilearn's `resample_img` of the whole run to the grid; time, z-scores and store as ours."""
    image = resample_img(
        nib.load(folder / RUN), grid.AFFINE, grid.SHAPE, interpolation="linear", force_resample=True, copy_header=True
    )  # fmt: skip
    mask = resample_img(
        nib.load(folder / MASK), grid.AFFINE, grid.SHAPE, interpolation="nearest", force_resample=True,
        copy_header=True,
    )  # fmt: skip
    brain = mask.get_fdata() > 0
    frames = resample_tr(np.ascontiguousarray(image.get_fdata(dtype=np.float32)[brain].T), TR, 0.8)
    z, moments, mean, sd = zscore(frames)
    record = {"run_id": "sub-01", "mean": mean, "sd": sd, "frames": len(z)}
    store.write_run(out, record, z, np.flatnonzero(brain), moments)


def published(folder: Path, out: Path) -> None:
    """The published way, from its description."""
    image: Any = nib.load(folder / RUN)
    data = torch.from_numpy(image.get_fdata()).float()
    data = data.permute(3, 0, 1, 2)[:, None]  # (X, Y, Z, T) -> (T, 1, X, Y, Z)
    sizes = [round(n * zoom / 2) for n, zoom in zip(data.shape[2:], image.header.get_zooms()[:3], strict=True)]
    if sizes != list(data.shape[2:]):
        data = functional.interpolate(data, size=sizes, mode="trilinear", align_corners=False)
    frames = int(len(data) * TR / 0.8)
    series = data[:, 0].reshape(len(data), -1).T[None]  # (1, XYZ, T)
    series = functional.interpolate(series, size=frames, mode="linear", align_corners=False)
    dense = series[0].T.reshape(frames, *sizes)
    dense = functional.pad(dense, [2, 3, -6, -7, 2, 3])  # 91 x 109 x 91 -> 96 x 96 x 96, about the middle
    brain = dense != 0
    mean, sd = dense[brain].mean(), dense[brain].std()
    z = (dense - mean) / sd
    z[~brain] = z[brain].min()
    out.mkdir()
    for number, frame in enumerate(z):
        torch.save(frame.half().clone(), out / f"frame_{number}.pt")
    (out / "scale.json").write_text(json.dumps({"mean": float(mean), "sd": float(sd)}))


CASES: dict[str, Callable[[Path, Path], None]] = {
    "ours": ours,
    "ours, without a mask": lambda folder, out: ours(folder, out, mask=False),
    "nilearn resample_img": by_nilearn,
    "published": published,
}


def error_of(out: Path) -> float:
    """Root mean square of stored minus true, at 2,000 places inside the brain, over all frames."""
    inside = np.flatnonzero(_eroded(grid.mni_brain()))
    chosen = np.sort(np.random.default_rng(1).choice(inside, 2000, replace=False))
    if (out / "scale.json").is_file():
        scale = json.loads((out / "scale.json").read_text())
        count = len(list(out.glob("*.pt")))
        rows = []
        for number in range(count):
            frame = torch.load(out / f"frame_{number}.pt").flip(0)  # LAS to RAS
            rows.append(frame.reshape(-1)[chosen].double().numpy())
        values = np.stack(rows)
    else:
        scale = {"mean": 0.0, "sd": 1.0}
        voxels, frames = store.read_voxels(out, "sub-01"), store.count_frames(out, "sub-01")
        values = store.read_values(out, "sub-01", 0, frames)[:, np.searchsorted(voxels, chosen)].astype(float)
    places = nib.affines.apply_affine(grid.AFFINE, np.stack(np.unravel_index(chosen, grid.SHAPE), axis=1))
    true = field(places, np.arange(len(values)) * 0.8)
    return float(np.sqrt(np.mean((values * scale["sd"] + scale["mean"] - true) ** 2)))


def _eroded(brain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Places with brain on every side, where no way mixes in the background."""
    return binary_erosion(brain, iterations=3)


def one(case: str, folder: str, out: str) -> None:
    """Run one case in this process and print its figures as JSON."""
    logging.disable()
    start = time.perf_counter()
    CASES[case](Path(folder), Path(out))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB
    say(json.dumps({"seconds": seconds, "peak": peak, "error": error_of(Path(out))}))


def compare(frames: int = 400, repeats: int = 1, dense: bool = True) -> None:
    """Measure every case in a process of its own, and print the table.

    Args:
        frames: of the run; 400 takes some minutes and, the published way, more than 16 GiB.
        repeats: of each case; the fastest counts.
        dense: also measure the published way.
    """
    names = [name for name in CASES if dense or name != "published"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder, frames)
        found = {case: _fastest(case, folder, repeats) for case in names}
    best = min(f["seconds"] for case, f in found.items() if f and not case.startswith("ours"))
    header = ["way", "time", "against the faster other", "peak memory", "error (RMS; the signal's SD is 14)"]
    rows = [
        [case, f"{f['seconds']:.1f} s", f"{best / f['seconds']:.1f} x", f"{f['peak']:.2f} GiB", f"{f['error']:.2f}"]
        if f
        else [case, "killed: out of memory", *[""] * 3]
        for case, f in found.items()
    ]
    say(f"{frames} frames of {SHAPE}, TR {TR} s. {machine()}\n\n{markdown(header, rows)}")


def _fastest(case: str, folder: Path, repeats: int) -> dict[str, float] | None:
    """The figures of the fastest repeat; None where the system killed the process for its memory."""
    found = []
    for number in range(repeats):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            command = [
                sys.executable,
                "-m",
                "scripts.benchmarks.preparation",
                "one",
                case,
                str(folder),
                f"{out}/{number}",
            ]
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode == -signal.SIGKILL:
                return None
            done.check_returncode()
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return min(found, key=lambda figures: figures["seconds"])


if __name__ == "__main__":
    arguments = sys.argv[1:] if sys.argv[1:2] == ["one"] else ["compare", *sys.argv[1:]]
    fire.Fire({"compare": compare, "one": one}, arguments, name="scripts.benchmarks.preparation")
