"""Values per label or region of an atlas: sums over voxels, intervals over subjects, tables, maps and pictures."""

from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from nilearn import plotting

from bundle.anatomy.atlas import Atlas
from bundle.anatomy.parcels import label_map
from bundle.files import write_bytes, written_whole
from bundle.pages import png

mpl.use("Agg")  # pictures go to files, also on machines without a display


def draw(table: pd.DataFrame, atlas: Atlas, stem: Path, title: str) -> None:
    """Write `<stem>.nii.gz` and `<stem>_brain.png` of the labels, and `<stem>_bars.png` of the groups.

    Nothing is written of labels or groups that have no value at all, as where subjects of one class have no separation.

    Args:
        table: rows with `level` ("group" or "label"), `name`, `value`, `low`, `high`.
        atlas: where the labels are.
        stem: path without an ending.
        title: what the values are, with their unit.
    """
    labels = table[table["level"] == "label"].set_index("name")["value"]
    if labels.notna().any():
        image = label_map(labels.to_dict(), atlas)
        with written_whole(stem.with_name(f"{stem.name}.nii.gz")) as unfinished:
            nib.save(image, unfinished)
        display = plotting.plot_glass_brain(image, colorbar=True, plot_abs=False, title=title, display_mode="lyrz")
        with written_whole(stem.with_name(f"{stem.name}_brain.png")) as unfinished:
            display.savefig(str(unfinished), dpi=90)
        display.close()
    groups = table[table["level"] == "group"].sort_values("value")
    if not groups["value"].notna().any():
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    errors = np.clip([groups["value"] - groups["low"], groups["high"] - groups["value"]], 0, None)
    axes.barh(groups["name"], groups["value"], xerr=np.nan_to_num(errors), color="#4477aa", capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"{title}\n(95 % interval over subjects)", fontsize="small")
    write_bytes(stem.with_name(f"{stem.name}_bars.png"), png(figure, 90))
