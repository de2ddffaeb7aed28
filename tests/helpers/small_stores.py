"""Prepared stores made in seconds: the synthetic cohort's signals in a few voxels of each AAL3 label, without NIfTI."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from bundle.anatomy import grid
from bundle.anatomy.atlas import labels_on, load_atlas
from bundle.experiments.signals import group_latents, label_signals
from bundle.experiments.synthetic import SITES, plan_cohort
from bundle.preparation.scaling import zscore
from bundle.preparation.store import write_manifest, write_run

TR = 0.8


def some_voxels(per_label: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat grid indices (V,), sorted, of a few voxels of every n-th label, and their label numbers."""
    labels = labels_on(load_atlas(), grid.AFFINE, grid.SHAPE).ravel()
    numbers = np.unique(labels[labels > 0])[::every]
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == number)[:per_label] for number in numbers]))
    return chosen, labels[chosen]


def planted_store(
    folder: Path, subjects: int, effect: float, seed: int = 0, frames: int = 100, per_label: int = 6, every: int = 4
) -> Path:
    """A store whose participants differ, by diagnosis, in limbic-cerebellar coupling only."""
    voxels, labels = some_voxels(per_label, every)
    numbers = np.unique(labels)

    def signal(subject: dict, rng: np.random.Generator) -> np.ndarray:
        latents = group_latents(subject["coupling_z"], frames, TR, rng)
        signals = label_signals(latents, numbers, TR, rng)  # (T, labels)
        return signals[:, np.searchsorted(numbers, labels)] + rng.standard_normal((frames, len(voxels)))

    return write_store(folder, plan_cohort(subjects, effect, seed, SITES), signal, voxels, seed)


def write_store(
    folder: Path,
    plan: pd.DataFrame,
    signal: Callable[[dict, np.random.Generator], np.ndarray],
    voxels: np.ndarray,
    seed: int = 0,
) -> Path:
    """A store of the participants of `plan_cohort`, one run each; `signal` gives its frames (T, V), in any unit."""
    for number, subject in enumerate(plan.to_dict("records")):
        values = signal(subject, np.random.default_rng([seed, number]))
        z, moments, mean, sd = zscore(values.astype(np.float32))
        name = subject["participant_id"]
        record = {
            "run_id": name,
            "participant_id": name,
            "site": subject["site"],
            "diagnosis": int(subject["diagnosis"] == "adhd"),
            "participant": {"age": subject["age"], "sex": subject["sex"]},
            "source": str(folder / "derivatives" / name / "func" / f"{name}_bold.nii.gz"),
            "source_sha256": f"{seed}-{plan['coupling_z'].sum():.6f}-{number}".ljust(12, "0"),
            "tr_in": TR,
            "frames": len(values),
            "voxels": len(voxels),
            "mean": mean,
            "sd": sd,
            "fill": float((values.min() - mean) / sd),
            "mask_source": str(folder / "derivatives" / "mask.nii.gz"),
            "parameters_hash": "p" * 12,
        }
        write_run(folder / "store", record, z, voxels, moments)
    write_manifest(folder / "store", {"tr": TR}, "p" * 12)
    return folder / "store"
