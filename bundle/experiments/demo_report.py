"""The page on which the demo ends: what was made, what was hidden and rebuilt, what was learnt, and what to do next."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.special import expit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundle.anatomy.atlas import load_atlas
from bundle.data.splits import SETS, count_table, load_splits
from bundle.evaluation.figures import mask_overlay
from bundle.experiments.trial import learning_curves
from bundle.files import write_text
from bundle.pages import drawn, embedded, measure_name, render
from bundle.preparation.chain import load_preparation
from bundle.preparation.prepare import GOOD_OVERLAP
from bundle.preparation.run_report import rugs
from bundle.preparation.store import read_manifest
from bundle.training.handlers import OF_STEPS

mpl.use("Agg")  # pictures go to files, also on machines without a display

PANEL = "original | masked | reconstructed"
REGION = "limbic"
"""The one that is shown, of those that are hidden in turn."""
NAMES = {0: "control", 1: "case"}
PLANTED = {
    "coupling": "how strongly they vary together over time, which no single frame shows,",
    "pattern": "how strongly the patterns inside their labels vary together over time",
    "intensity": "brightness",
}
_BLUE, _ORANGE, _GREY = "#1f5f8b", "#d1601c", "#8a96a3"


def write_demo_report(folder: str | Path) -> Path:
    """Write `report.html` in the demo's folder, from what the demo has left there.

    Args:
        folder: holds `derivatives`, `store`, `pretrain` and `train`, the last with its `evaluation`.

    Returns:
        The page's path.
    """
    folder = Path(folder)
    store, evaluation = folder / "store", folder / "train" / "evaluation"
    truth = json.loads((folder / "derivatives" / "truth.json").read_text())
    runs = read_manifest(store)["runs"]
    curves = learning_curves(folder).query("stage == 'pretrain'")
    subjects = pd.read_csv(evaluation / "subjects.tsv", sep="\t")
    sites = {run["participant_id"]: run["site"] for run in runs}
    test = json.loads((evaluation / "scores.json").read_text())
    threshold = float(expit(test["threshold"]))
    summary = pd.read_csv(store / "summary.tsv", sep="\t").fillna({"warnings": "", "reason": ""}).to_dict("records")
    low = {"coverage": load_preparation().min_coverage, "mni_overlap": GOOD_OVERLAP}
    context = {
        "truth": truth,
        "planted": PLANTED[truth["parameters"]["effect_on"]],
        "runs": len(runs),
        "participants": len(sites),
        "sites": sorted(set(sites.values())),
        "counts": _counts(count_table(load_splits(store / "splits.json"), runs)),
        "region": REGION,
        "mask": _mask_picture(store, runs[0]["run_id"]),
        "masked_run": runs[0]["run_id"],
        "rebuilt": drawn(rebuilt_figure(_last_panel(folder / "pretrain" / "tensorboard"))),
        "last": curves.groupby("tag")["value"].last().to_dict(),
        "epochs": int(_by_epoch(curves)["step"].max()),
        "curves": [drawn(figure) for figure in curve_figures(curves)],
        "subjects": subjects.assign(site=subjects["participant_id"].map(sites).fillna("–")).to_dict("records"),
        "names": NAMES,
        "threshold": threshold,
        "subject_plot": drawn(subject_figure(subjects, threshold)),
        "scores": {measure_name(name): score for name, score in test["scores"].items()},
        "score_plot": drawn(score_figure(test["scores"])),
        "rugs": [line for line in rugs(summary, low) if line["unit"] == "%"],
    }
    write_text(folder / "report.html", render("demo.html.j2", **context))
    return folder / "report.html"


def _counts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per site: "site", and for each set the numbers of controls and cases."""
    table = pd.DataFrame(rows).set_index(["site", "set", "diagnosis"])["participants"]
    return [
        {"site": site}
        | {name: [int(table.get((site, name, label), 0)) for label in ("control", "adhd")] for name in SETS}
        for site in sorted(table.index.unique("site"))
    ]


def _mask_picture(store: Path, run_id: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder, "mask.png")
        mask_overlay(store, run_id, png, REGION, load_atlas())
        return embedded(png.read_bytes())


def _last_panel(events: Path) -> NDArray:
    """The latest picture that pretraining's validation wrote to TensorBoard, grey values, (3 n, 3 n)."""
    accumulator = EventAccumulator(str(events), size_guidance={"images": 1})
    accumulator.Reload()
    picture = imread(BytesIO(accumulator.Images(PANEL)[-1].encoded_image_string), format="png")
    return picture[..., 0] if picture.ndim == 3 else picture


def rebuilt_figure(panel: NDArray) -> Figure:
    """Original, masked and rebuilt planes with names, directions, and the edge of what was hidden.

    Args:
        panel: as from `bundle.training.handlers.reconstruction_panel`, (3 n, 3 n): planes of n x n voxels.
    """
    size = len(panel) // 3
    planes = panel.reshape(3, size, 3, size).swapaxes(1, 2)  # (row, column, size, size)
    figure = Figure(figsize=(7, 7.3), layout="constrained", facecolor="black")
    axes = figure.subplots(3, 3)
    for row, (ends, plane) in enumerate(zip((("P", "A"), ("L", "R"), ("L", "R")), planes, strict=True)):
        hidden = plane[0] != plane[1]
        for column, title in enumerate(("original", "hidden", "rebuilt")):
            panel_axes = axes[row, column]
            panel_axes.imshow(plane[column], cmap="gray", vmin=0, vmax=1)
            panel_axes.contour(hidden, levels=[0.5], colors=_ORANGE, linewidths=1)
            panel_axes.axis("off")
            for x, end in zip((0.04, 0.96), ends, strict=True):
                panel_axes.text(x, 0.94, end, color="white", transform=panel_axes.transAxes, ha="center", fontsize=11)
            if row == 0:
                panel_axes.set_title(title, color="white", fontsize=13)
    return figure


def _by_epoch(curves: pd.DataFrame) -> pd.DataFrame:
    return curves[~curves["tag"].isin(OF_STEPS)]


def curve_figures(curves: pd.DataFrame) -> list[Figure]:
    """Pretraining's loss, and its temporal R² on the validation set, over the epochs.

    Args:
        curves: from `bundle.experiments.trial.learning_curves`, of pretraining.
    """
    lines = {str(tag): line.set_index("step")["value"] for tag, line in curves.groupby("tag")}
    epochs = _by_epoch(curves)["step"].max()
    steps = lines["iteration_loss"].copy()
    steps.index = steps.index * epochs / steps.index.max()
    mean = {"training": lines["train_masked_mse"], "validation": lines["val_masked_mse"]}
    score = {"validation": lines["val_temporal_r2"]}
    first, axes = _panel("epochs", "squared error of hidden voxels")
    axes.plot(steps, color=_GREY, linewidth=0.8, alpha=0.7, label="each step")
    second, score_axes = _panel("epochs", "temporal R² of hidden voxels")
    score_axes.axhline(0, color="black", linewidth=0.8, linestyle="--", label="a flat line")
    for panel_axes, named in ((axes, mean), (score_axes, score)):
        panel_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for colour, (label, line) in zip((_BLUE, _ORANGE), named.items(), strict=False):
            panel_axes.plot(line, color=colour, marker="o", markersize=3.5, label=label)
        panel_axes.legend(frameon=False, fontsize="small")
    return [first, second]


def _panel(across: str, up: str, height: float = 3.3) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.8, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def subject_figure(subjects: pd.DataFrame, threshold: float) -> Figure:
    """Each test subject's probability, cases and controls apart, and the threshold.

    Args:
        subjects: "participant_id", "label" and "probability".
        threshold: probability above which a subject is called a case.
    """
    table = subjects.sort_values("probability").reset_index(drop=True)
    figure, axes = _panel("probability of being a case (SYNTHETIC data)", "", 1.3 + 0.28 * len(table))
    for label, colour, marker in ((0, _BLUE, "s"), (1, _ORANGE, "o")):
        part = table[table["label"] == label]
        axes.scatter(part["probability"], part.index, color=colour, marker=marker, s=55, zorder=3, label=NAMES[label])
    axes.axvline(threshold, color="black", linewidth=0.9, linestyle="--", label="threshold")
    axes.set_yticks(table.index, table["participant_id"])
    axes.margins(x=0.12, y=0.12)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def score_figure(scores: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """The test's scores with their 95 % intervals; a score or a limit that is null is left out."""
    names = [name for name in ("accuracy", "balanced_accuracy", "auroc") if name in scores]
    figure, axes = _panel("score (SYNTHETIC data)", "", 1.2 + 0.45 * len(names))
    for row, name in enumerate(names):
        value, low, high = (
            float("nan" if (end := scores[name][key]) is None else end) for key in ("value", "low", "high")
        )
        axes.plot([low, high], [row, row], color=_BLUE, linewidth=2.5, solid_capstyle="round")
        axes.plot([value], [row], "o", color=_BLUE, markersize=8)
    axes.axvline(0.5, color="black", linewidth=0.9, linestyle="--")
    axes.set_yticks(range(len(names)), [measure_name(name) for name in names])
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(names) - 0.4))
    return figure
