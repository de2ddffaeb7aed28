"""What sees what, to look at: the AUROC of every readout, cohorts side by side."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bundle.experiments.auroc import PAINTED, without_controls

GREY = "#777777"


def what_sees_what(table: pd.DataFrame, no_encoder: str) -> Figure:
    """Draw the AUROC with all training subjects, without controls: a panel per cohort, a row per readout and encoder.

    Args:
        table: as `bundle.experiments.auroc.summarise` returns it.
        no_encoder: what the column `encoder` says of readouts without one; these are grey, and on top.
    """
    plain = without_controls(table)
    rows = plain[["readout", "encoder"]].drop_duplicates()
    own = rows["encoder"] != no_encoder
    encoders = list(dict.fromkeys(rows.loc[own, "encoder"]))
    rows["label"] = rows["readout"].where(~own, rows["readout"] + " – " + rows["encoder"])
    rows["colour"] = [f"C{encoders.index(name) % 10}" if name in encoders else GREY for name in rows["encoder"]]
    block = np.where(own, rows["readout"].factorize()[0], -1)
    order = np.lexsort((rows["encoder"].factorize()[0], block))
    rows, block = rows.iloc[order], block[order]
    gaps = np.concatenate([[0], np.cumsum(np.diff(block) != 0)])  # between blocks of one readout
    rows = rows.assign(place=-(np.arange(len(rows)) + 0.6 * gaps))
    cohorts = list(dict.fromkeys(plain["cohort"]))
    figure = Figure(figsize=(3.5 + 2.1 * len(cohorts), 1.6 - 0.22 * rows["place"].min()), layout="constrained")
    panels = figure.subplots(1, len(cohorts), sharex=True, sharey=True, squeeze=False)[0]
    for axes, cohort in zip(panels, cohorts, strict=True):
        found = plain[plain["cohort"] == cohort].merge(rows, on=["readout", "encoder"])
        axes.hlines(found["place"], found["low"], found["high"], colors=found["colour"], linewidth=2)
        axes.scatter(found["auroc"], found["place"], c=found["colour"], s=20, zorder=3)
        axes.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=f"{cohort}\n({'real courses' if cohort == PAINTED else 'SYNTHETIC'})", xlabel="AUROC")
    panels[0].set_yticks(rows["place"], rows["label"], fontsize=8)
    panels[0].margins(y=0.02)
    figure.suptitle("AUROC over subjects, with 95 % intervals; grey: no encoder", fontsize=10)
    return figure
