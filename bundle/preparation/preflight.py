"""Look at every run before preparing it: the same steps as preparation, nothing stored, a report with pictures."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bundle.anatomy.atlas import load_atlas, located
from bundle.errors import InputError
from bundle.preparation import run_report
from bundle.preparation.chain import Preparation, load_preparation
from bundle.preparation.pictures import picture
from bundle.preparation.prepare import GOOD_OVERLAP, attempt, identify_runs, prepared_item, row_of
from bundle.preparation.sources import Run
from bundle.workers import parallel_map

logger = logging.getLogger(__name__)


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
        pictures: draw each run's mean BOLD with contours of its brain mask and of the regions.

    Returns:
        One row per run, as in the report; "status" is "ready", "excluded" or "failed".

    Raises:
        InputError: there are no runs, the atlas cannot be used, or the report cannot be written.
    """
    if not runs:
        raise InputError("there are no runs to look at; check the source")
    preparation = preparation or load_preparation()
    preparation = replace(preparation, atlas=located(preparation.atlas))  # for workers elsewhere
    load_atlas(preparation.atlas)  # what is wrong with it is said once, not of every run
    with parallel_map(workers, scheduler) as each:
        identities = identify_runs(preparation, runs, {}, each)
        looked = each(partial(_look, preparation, pictures), list(zip(runs, identities, strict=True)), "looking")
    rows = [row for row, _ in looked]
    drawn = {row["run_id"]: picture for row, picture in looked if picture}
    low = {"coverage": preparation.min_coverage, "mni_overlap": GOOD_OVERLAP}
    title, shown = "Preflight: what the runs are like", drawn if pictures else None
    run_report.write(rows, folder, "preflight.tsv", "preflight.html", title, shown, low)
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
    if not (item and pictures):
        return row, None
    return row, picture(
        item["bold"].mean(axis=0, dtype=np.float32), item["voxels"], preparation.atlas, preparation.native
    )
