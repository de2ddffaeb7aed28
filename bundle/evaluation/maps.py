"""Values per AAL3 label or region: sums over voxels, intervals over subjects, tables, maps and pictures."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pandas as pd
from nilearn import plotting
from numpy.typing import NDArray

from bundle.anatomy import grid
from bundle.anatomy.atlas import REGIONS, Atlas, labels_on
from bundle.evaluation.intervals import limits

mpl.use("Agg")  # pictures go to files, also on machines without a display
from matplotlib import pyplot as plt

OTHER = "insula"
"""Name of the group of labels that are in none of the seven regions (of AAL3: the insula)."""


def units(atlas: Atlas, level: str) -> dict[str, tuple[int, ...]]:
    """Label numbers of each unit: ``level`` "group" (the seven regions and the insula) or "label" (each label)."""
    if level == "label":
        return {name: (number,) for number, name in atlas.names.items()}
    groups = {name: tuple(n for n in numbers if n in atlas.names) for name, numbers in REGIONS.items()}
    rest = tuple(set(atlas.names).difference(*groups.values()))
    return {name: numbers for name, numbers in (groups | {OTHER: tuple(sorted(rest))}).items() if numbers}


def unit_index(atlas: Atlas, members: Mapping[str, tuple[int, ...]]) -> NDArray[np.int64]:
    """Which unit each voxel of the grid belongs to: ``grid.SHAPE``, 0 for none, 1 for the first unit."""
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    table = np.zeros(labels.max() + 1, np.int64)
    for position, numbers in enumerate(members.values(), start=1):
        table[list(numbers)] = position
    return table[labels]


def interval(
    samples: tuple[NDArray, ...], statistic: Callable, paired: bool, resamples: int, seed: int
) -> dict[str, NDArray]:
    """A statistic of subjects (first axis of each sample) with its 95 % interval, see `bundle.evaluation.intervals`.

    Returns:
        ``{"value", "low", "high"}``, each of the shape of one subject's row; NaN limits with fewer than two subjects,
        all NaN where a sample has none.
    """
    if min(len(sample) for sample in samples) == 0:
        value = np.full(samples[0].shape[1:], np.nan)
    else:
        value = statistic(*samples, axis=0)
    low, high = limits(samples, statistic, resamples, seed, paired)
    return {"value": value, "low": np.broadcast_to(low, value.shape), "high": np.broadcast_to(high, value.shape)}


def label_map(values: Mapping[str, float], atlas: Atlas) -> nib.Nifti1Image:
    """Paint each label's value on the grid (MNI, 2 mm); voxels without a label are 0."""
    labels = labels_on(atlas, grid.AFFINE, grid.SHAPE)
    table = np.zeros(labels.max() + 1, np.float32)
    for number, name in atlas.names.items():
        table[number] = values.get(name, 0.0)
    return nib.Nifti1Image(np.nan_to_num(table[labels]), grid.AFFINE)


def draw(table: pd.DataFrame, atlas: Atlas, stem: Path, title: str) -> None:
    """Write ``<stem>.nii.gz`` and ``<stem>_brain.png`` of the labels, and ``<stem>_bars.png`` of the groups.

    Nothing is written of labels or groups that have no value at all, as where subjects of one class have no separation.

    Args:
        table: rows with ``level`` ("group" or "label"), ``name``, ``value``, ``low``, ``high``.
        atlas: where the labels are.
        stem: path without an ending.
        title: what the values are, with their unit.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    labels = table[table["level"] == "label"].set_index("name")["value"]
    if labels.notna().any():
        image = label_map(labels.to_dict(), atlas)
        nib.save(image, stem.with_name(f"{stem.name}.nii.gz"))
        display = plotting.plot_glass_brain(image, colorbar=True, plot_abs=False, title=title, display_mode="lyrz")
        display.savefig(str(stem.with_name(f"{stem.name}_brain.png")), dpi=90)
        display.close()
    groups = table[table["level"] == "group"].sort_values("value")
    if not groups["value"].notna().any():
        return
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    errors = np.clip([groups["value"] - groups["low"], groups["high"] - groups["value"]], 0, None)
    axes.barh(groups["name"], groups["value"], xerr=np.nan_to_num(errors), color="#4477aa", capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"{title}\n(95 % interval over subjects)", fontsize="small")
    figure.savefig(stem.with_name(f"{stem.name}_bars.png"), dpi=90)
    plt.close(figure)
