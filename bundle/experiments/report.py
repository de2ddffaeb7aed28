"""One report of a sweep: HTML in a single file, and Markdown with pictures beside it, from the results folder alone."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from bundle.anatomy.atlas import load_atlas
from bundle.evaluation import attribution, reconstruction
from bundle.evaluation.maps import draw
from bundle.experiments.statistics import REFERENCE, Outcomes, compare, finished_trials, read_outcomes
from bundle.files import slug, write_bytes, write_text
from bundle.pages import embedded, measure_name, png, render
from bundle.tasks.scores import measure
from bundle.tasks.task import Task
from bundle.training.handlers import OF_STEPS

mpl.use("Agg")  # pictures go to files, also on machines without a display

logger = logging.getLogger(__name__)

Trials = list[tuple[Path, dict]]


def write_report(results: str | Path, resamples: int = 2000, seed: int = 0, reference: str = REFERENCE) -> Path:
    """Write `report.html`, `report.md`, `report/*.png`, `table.csv` and `regions.csv` in a results folder.

    Args:
        results: folder of a sweep's results; nothing else is read.
        resamples: bootstrap resamples and permutations.
        seed: of both.
        reference: the strategy that others are compared with.

    Returns:
        The path of the HTML file.

    Raises:
        InputError: the folder holds no results, or no trial is finished.
    """
    results = Path(results)
    trials = finished_trials(results)
    tested = read_outcomes(results)
    plan, data = (json.loads((results / name).read_text()) for name in ("sweep.json", "data.json"))
    atlases = {record["strategy"]: record["settings"]["atlas"] for _, record in trials}
    pictures = results / "report"
    pictures.mkdir(exist_ok=True)
    label = {True: "SYNTHETIC data", False: "", None: "data of unknown origin"}[data["synthetic"]]

    table = compare(tested, reference, resamples, seed)
    table = table.merge(_own_reconstruction(trials), on="strategy", how="left")
    table.insert(1, "kind", table["strategy"].map({record["strategy"]: record["kind"] for _, record in trials}))
    regions = region_reconstruction(trials, atlases, resamples, seed)
    write_text(results / "table.csv", table.to_csv(index=False))
    write_text(results / "regions.csv", regions.to_csv(index=False))
    task = next(iter(tested.values())).task
    _save(forest_plot(table, task, label), pictures / "forest.png")
    outcome = {name: f"outcome_{slug(name)}.png" for name in tested}
    for name, file in outcome.items():
        _save(outcome_plot(tested[name], label), pictures / file)
    curves = {stage: figure for stage in ("pretrain", "train") if (figure := curves_plot(trials, stage, label))}
    for stage, figure in curves.items():
        _save(figure, pictures / f"curves_{stage}.png")
    attributed = attribution_figures(trials, atlases, pictures, resamples, seed, label)

    names = dict.fromkeys(Path(record["settings"]["splits_file"]).name for _, record in trials)
    splits = [results / "splits" / name for name in names]  # an earlier plan's are there too
    context = {
        "label": label,
        "synthetic": data["synthetic"],
        "data": data,
        "plan": plan,
        "reference": reference,
        "task": task,
        "metrics": [name for name in (*task.metrics, f"{task.within}_within_site") if name in table],
        "outcome": outcome,
        "resamples": resamples,
        "table": table.to_dict("records"),
        "by_fold": by_fold(tested).to_dict("records"),
        "one_class": one_class_folds(tested),
        "regions": _wide(regions),
        "curves": list(curves),
        "attributed": attributed,
        "trials": [{"name": folder.name} | record for folder, record in trials],
        "unfinished": sorted(set(plan["trials"]) - {folder.name for folder, _ in trials}),
        "versions": _versions(trials),
        "configs": {path.stem: path.read_text() for path in sorted((results / "configs").glob("*.json"))},
        "splits": {path.stem: json.loads(path.read_text())["sha256"] for path in splits},
    }
    return _render(results, pictures, context)


def _render(results: Path, pictures: Path, context: Mapping[str, Any]) -> Path:
    html = render("report.html.j2", **context, picture=lambda name: embedded((pictures / name).read_bytes()))
    markdown = render("report.md.j2", **context, picture=lambda name: f"report/{name}")
    write_text(results / "report.html", html)
    write_text(results / "report.md", markdown)
    logger.info("Wrote %s and report.md", results / "report.html")
    return results / "report.html"


def _own_reconstruction(trials: Trials) -> pd.DataFrame:
    """Each strategy's reconstruction with its own masks, the mean over its trials."""
    rows = []
    for folder, record in trials:
        path = folder / "pretrain" / "reconstruction" / "reconstruction.json"
        if path.is_file():
            rows.append({"strategy": record["strategy"]} | json.loads(path.read_text()))
    table = pd.DataFrame(rows, columns=["strategy", "masked_mse", "temporal_r2"])
    scores = table.astype({"masked_mse": float, "temporal_r2": float})  # null, for undefined, to NaN
    return scores.groupby("strategy").mean().reset_index()


def region_reconstruction(trials: Trials, atlases: Mapping[str, str], resamples: int, seed: int) -> pd.DataFrame:
    """MSE and temporal R² of each strategy, region by region of its atlas, over the subjects of all its trials."""
    tables = _per_strategy(trials, Path("pretrain", "reconstruction", "reconstruction_subjects.csv"))
    bar = tqdm(tables.items(), desc="reconstruction by region", unit="strategy", disable=not tables)
    parts = [
        reconstruction.summarise(table, load_atlas(atlases[name]), resamples, seed).assign(
            strategy=name, atlas=atlases[name]
        )
        for name, table in bar
    ]
    columns = ["strategy", "atlas", "level", "name", "measure", "value", "low", "high"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def _per_strategy(trials: Trials, file: Path) -> dict[str, pd.DataFrame]:
    """A table that the trials have, of all folds and seeds of each strategy."""
    tables: dict[str, list[pd.DataFrame]] = {}
    for folder, record in trials:
        if (folder / file).is_file():
            table = pd.read_csv(folder / file, dtype={"participant_id": str})
            tables.setdefault(record["strategy"], []).append(table.assign(fold=record["fold"], seed=record["seed"]))
    return {strategy: pd.concat(parts) for strategy, parts in tables.items()}


def _wide(regions: pd.DataFrame) -> list[dict[str, Any]]:
    """Temporal R² and MSE of the whole and of the groups: one row per strategy, one column per region; by atlas."""
    return [
        _of_one_atlas(part) | {"atlas": Path(str(atlas)).name} for atlas, part in regions.groupby("atlas", sort=False)
    ]


def _of_one_atlas(regions: pd.DataFrame) -> dict[str, Any]:
    shown = regions[regions["level"] != "label"]
    names = list(dict.fromkeys(shown["name"]))
    trials = {(row.strategy, row.measure, row.name): row._asdict() for row in shown.itertuples(index=False)}
    strategies = list(dict.fromkeys(shown["strategy"]))
    return {
        "names": names,
        "measures": {
            measure: {s: [trials[s, measure, name] for name in names] for s in strategies}
            for measure in ("temporal_r2", "mse")
        },
    }


def by_fold(tested: Mapping[str, Outcomes]) -> pd.DataFrame:
    """The measures of each strategy in each fold (each site left out, in a leave-one-site-out sweep)."""
    rows = []
    for strategy, own in tested.items():
        for fold in dict.fromkeys(own.folds):
            part = own.select([p for p, f in zip(own.participants, own.folds, strict=True) if f == fold])
            scores = measure(part.task, part.tested)
            rows.append({"strategy": strategy, "fold": fold, "subjects": len(part.participants)} | scores)
    return pd.DataFrame(rows).sort_values(["fold", "strategy"])


def one_class_folds(tested: Mapping[str, Outcomes]) -> list[str]:
    """Folds (or sites) whose test subjects are all of one class, with their number: "west (3 control)"."""
    task = next(iter(tested.values())).task
    people = pd.concat(
        [
            pd.DataFrame({"name": own.participants, "fold": own.folds, "label": own.tested.labels})
            for own in tested.values()
        ]
    ).drop_duplicates("name")
    folds = people.groupby("fold")["label"]
    return [
        f"{fold} ({len(labels)} {task.classes[int(labels.iloc[0])]})"
        for fold, labels in folds
        if task.classes and labels.nunique() == 1
    ]


def forest_plot(table: pd.DataFrame, task: Task, label: str) -> Figure:
    """Two measures of every strategy with their intervals; the line is what knows nothing."""
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.32 * len(table)), sharey=True, layout="constrained", squeeze=False
    )
    rows = np.arange(len(table))[::-1]
    colours = ["#777777" if kind == "baseline" else "#225588" for kind in table["kind"]]
    for axes, (metric, chance) in zip(panels[0], task.chance.items(), strict=True):
        low, high = table[f"{metric}_low"], table[f"{metric}_high"]
        axes.hlines(rows, low, high, colors=colours, linewidth=2)
        axes.scatter(table[metric], rows, c=colours, s=36, zorder=3)
        axes.axvline(chance, color="black", linewidth=0.8, linestyle="--")
        if task.classes:
            axes.set_xlim(0, 1)
        axes.set_xlabel(f"{measure_name(metric)} (95 % interval over subjects)")
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(rows, table["strategy"])
    figure.suptitle(f"Test scores of {task.column} {label and '– ' + label}")
    return figure


def outcome_plot(own: Outcomes, label: str) -> Figure:
    """What `Task.draw` shows of one strategy, over all folds and seeds."""
    figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    own.task.draw(axes, own.tested)
    figure.suptitle(label)
    return figure


def curves_plot(trials: Trials, stage: str, label: str) -> Figure | None:
    """Learning curves of a stage: a panel per quantity, a colour per strategy, and a line per fold and seed.

    Returns:
        The picture, None where there are no curves.
    """
    parts = []
    for folder, record in trials:
        if (folder / "curves.tsv").is_file():
            table = pd.read_csv(folder / "curves.tsv", sep="\t")
            parts.append(table[table["stage"] == stage].assign(strategy=record["strategy"], trial=folder.name))
    curves = pd.concat(parts) if parts else pd.DataFrame(columns=["tag"])
    tags = [tag for tag in dict.fromkeys(curves["tag"]) if curves.loc[curves["tag"] == tag, "value"].notna().any()]
    if not tags:
        return None
    columns = min(3, len(tags))
    lines = -(-len(tags) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4 * columns, 2.8 * lines), layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("tab20")
    names = list(dict.fromkeys(curves["strategy"]))
    for axes, tag in zip(panels.flat, tags, strict=False):
        for (strategy, _), line in curves[curves["tag"] == tag].groupby(["strategy", "trial"], sort=False):
            colour = colours(names.index(strategy) % 20)
            axes.plot(line["step"], line["value"], color=colour, alpha=0.8, linewidth=0.8, marker=".", markersize=3)
        axes.set(title=tag, xlabel="iterations" if tag in OF_STEPS else "epochs")
    for axes in panels.flat[len(tags) :]:
        axes.axis("off")
    handles = [plt.Line2D([], [], color=colours(i % 20), label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(names)), fontsize="small")
    figure.suptitle(f"{stage} {label and '– ' + label}")
    return figure


def attribution_figures(
    trials: Trials, atlases: Mapping[str, str], pictures: Path, resamples: int, seed: int, label: str
) -> list[dict[str, Any]]:
    """Pictures of each strategy's attribution over the subjects of all its trials, see `attribution.within_folds`.

    Returns:
        `strategy`, `method` and `pictures` (file names) of each: the regions' separation per 1000 voxels.
    """
    found = []
    tables = _per_strategy(trials, Path("train", "attribution", "attribution_subjects.csv"))
    for strategy, table in tqdm(tables.items(), desc="attribution", unit="strategy", disable=not tables):
        keys = ["participant_id", "label", "method", "level", "name", "voxels"]
        subjects = attribution.within_folds(table).groupby(keys, sort=False)["value"].mean().reset_index()  # over seeds
        if subjects.empty:  # no fold holds both cases and controls
            continue
        summary = attribution.summarise(subjects, resamples, seed)
        for method, part in summary[summary["measure"] == "separation_per_1000_voxels"].groupby("method"):
            title = f"{str(method).replace('_', ' ')}, separation per 1000 voxels {label and '– ' + label}"
            stem = pictures / f"attribution_{slug(strategy)}_{method}"
            draw(part, load_atlas(atlases[strategy]), stem, title)
            names = [f"{stem.name}_bars.png", f"{stem.name}_brain.png"]
            shown = [name for name in names if (pictures / name).is_file()]
            found.append({"strategy": strategy, "method": str(method).replace("_", " "), "pictures": shown})
    return found


def _versions(trials: Trials) -> dict[str, str]:
    """Version of each package; all of them where trials were run with several."""
    seen: dict[str, set[str]] = {}
    for _, record in trials:
        for name, number in record["versions"].items():
            seen.setdefault(name, set()).add(number)
    return {name: ", ".join(sorted(numbers)) for name, numbers in seen.items()}


def _save(figure: Figure, path: Path) -> None:
    write_bytes(path, png(figure, 110))
    plt.close(figure)
