"""Look at every run before preparing it: the same steps as preparation, nothing stored, a report with pictures."""

import io
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from nilearn import plotting

from bundle.anatomy import atlas, grid
from bundle.anatomy.parcels import dense
from bundle.errors import InputError
from bundle.preparation import run_report
from bundle.preparation.prepare import Preparation, attempt, identify_runs, load_preparation, prepared_item, row_of
from bundle.preparation.sources import Run
from bundle.workers import parallel_map

logger = logging.getLogger(__name__)

mpl.use("Agg")  # pictures go to files, also on machines without a display


def preflight(
    runs: Sequence[Run],
    folder: str | Path,
    preparation: Preparation | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    pictures: bool = True,
) -> list[dict[str, Any]]:
    """Check every run as preparation would, and write `preflight.tsv` and `preflight.html` (with pictures).

    Args:
        runs: from `bundle.preparation.sources`.
        folder: where the report goes.
        preparation: parameters; None takes the defaults.
        workers: processes on this machine.
        scheduler: address of a Dask scheduler whose workers are used instead.
        pictures: draw each run's mean BOLD with contours of its brain mask and of the seven regions.

    Returns:
        One row per run, as in the report; "status" is "ready", "excluded" or "failed".

    Raises:
        InputError: there are no runs, or the report cannot be written.
    """
    if not runs:
        raise InputError("there are no runs to look at; check the source")
    preparation = preparation or load_preparation()
    with parallel_map(workers, scheduler) as each:
        identities = identify_runs(preparation, runs, {}, each)
        looked = each(partial(_look, preparation, pictures), list(zip(runs, identities, strict=True)), "looking")
    rows = [row for row, _ in looked]
    drawn = {row["run_id"]: picture for row, picture in looked if picture}
    run_report.write(rows, folder, "preflight.tsv", "preflight.html", "Preflight: what the runs are like", drawn)
    bad = [row for row in rows if row["status"] != "ready" or row["warnings"]]
    logger.info(
        "%d of %d runs are ready without a warning; see %s/preflight.html", len(rows) - len(bad), len(rows), folder
    )
    for row in bad:
        logger.warning("%s %s: %s", row["run_id"], row["status"], row["reason"] or row["warnings"])
    return rows


def _look(
    preparation: Preparation, pictures: bool, task: tuple[Run, Mapping[str, Any]]
) -> tuple[dict[str, Any], bytes | None]:
    run, identity = task
    if "problem" in identity:
        return row_of(run, preparation, "failed", reason=identity["problem"]), None
    item: dict[Any, Any] = {}

    def work() -> dict[Any, Any]:
        item.update(prepared_item(run, identity, preparation))
        return item

    row = attempt(run, preparation, work, "ready")
    return row, picture(item["bold"].mean(axis=0, dtype=np.float32), item["voxels"]) if item and pictures else None


def picture(values: np.ndarray, voxels: np.ndarray) -> bytes:
    """Draw in-brain values (V,) with contours of their brain mask (white) and of the seven regions (colours).

    Returns:
        A PNG file's bytes.
    """
    volume = dense(values.astype(np.float32), voxels, fill=values.min())
    brain = dense(np.ones(len(voxels), np.float32), voxels)
    figure = Figure(figsize=(7.2, 2.6), facecolor="black")
    display = plotting.plot_anat(
        _image(volume), figure=figure, display_mode="ortho", cut_coords=(-24, -30, -10), cmap="gray", colorbar=False,
        draw_cross=False, black_bg=True, dim=0,
    )  # fmt: skip
    display.add_contours(_image(brain), levels=[0.5], colors="white", linewidths=0.7)
    labels = atlas.labels_on(atlas.load_atlas(), grid.AFFINE, grid.SHAPE)
    for number, members in enumerate(atlas.REGIONS.values()):
        region = np.isin(labels, members).astype(np.float32)
        display.add_contours(_image(region), levels=[0.5], colors=[colormaps["Set1"](number)], linewidths=0.6)
    file = io.BytesIO()
    figure.savefig(file, dpi=80, facecolor="black")
    return file.getvalue()


def _image(values: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, grid.AFFINE)
