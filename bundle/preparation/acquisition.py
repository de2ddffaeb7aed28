"""What a stored run is like before any network sees it: intensity, coverage, head motion, TR, origin of its mask."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas, region_coverage
from bundle.anatomy.parcels import dense
from bundle.preparation.store import read_moments, read_voxels
from bundle.preparation.transforms import mask_kind

PERCENTILES = (5, 50, 95)


def acquisition(store: str | Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a participant's stored runs are like; numbers are means over the runs.

    Args:
        store: folder of the prepared store.
        records: of the participant's runs, as in the manifest.

    Returns:
        "intensity": {name: number}, of the BOLD signal its mean in the file's units (asinh, a logarithm that takes
        negative values too), its SD over voxels and frames beside the mean (0 to 1), and how much of it is
        fluctuation over time (log of the median voxel's SD beside it); of the voxels' means, in the run's z,
        percentiles and the mean of each AAL3 group. "coverage": {name: number}, shares of the MNI152 brain and of the
        AAL3 groups that the brain mask covers, and the log of its volume beside the MNI152 brain's. "motion": log of
        the mean framewise displacement, mm, plus 0.01; None where it is not known. "tr": of each run, s. "masks": of
        each run, see `mask_kind`.

    Raises:
        InputError: a run's arrays are damaged.
    """
    found = [_of_run(store, record) for record in records]
    motions = [record["mean_fd"] for record in records if record.get("mean_fd") is not None]
    return {
        "intensity": _mean([intensity for intensity, _ in found]),
        "coverage": _mean([coverage for _, coverage in found]),
        "motion": math.log(max(float(np.mean(motions)), 0.0) + 0.01) if motions else None,
        "tr": [float(record["tr_in"]) for record in records],
        "masks": [mask_kind(record) for record in records],
    }


def _of_run(store: str | Path, record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    voxels = read_voxels(store, record["run_id"])
    mean, sd = read_moments(store, record["run_id"])
    z = (mean - record["mean"]) / record["sd"]
    atlas = load_atlas()
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE).ravel()[voxels]
    intensity = {
        "mean": math.asinh(record["mean"]),
        "SD beside the mean": record["sd"] / (abs(record["mean"]) + record["sd"]),
        "fluctuation over time": math.log(max(float(np.median(sd)) / record["sd"], 1e-6)),
    }
    intensity |= {f"{p}th percentile of the voxels": float(np.percentile(z, p)) for p in PERCENTILES}
    for group, members in atlas.groups.items():
        inside = np.isin(labels, members)
        intensity[f"mean of {group}"] = float(z[inside].mean()) if inside.any() else 0.0
    brain = dense(np.ones(len(voxels), bool), voxels)
    coverage = {"the MNI brain": grid.mni_overlap(brain)} | region_coverage(atlas, brain)
    return intensity, coverage | {"its volume": math.log(len(voxels) / int(grid.mni_brain().sum()))}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
