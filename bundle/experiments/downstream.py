"""Tasks x heads: a sweep for each of several targets of several cohorts, and one table of all.

A plan (see configs/downstream.json) is a JSON file:

    results   folder of the results
    cohorts   name to what it is made of: `subjects`, `planted`, `effect`, `seed` and `duration_s` of
              `bundle.experiments.truth.prepared_cohort`, or `painted`, the arguments of
              `bundle.experiments.painted.paint` without its folder
    tasks     name to a cohort, and entries of a sweep: its target above all
    sweep     entries of a sweep that all tasks share; strategies are heads, and share the pretraining of their task.
              Baselines that a task or a cohort cannot have are left out

Run again, it goes on where it was: each task is a sweep with trials of its own, see `bundle.experiments.trial`.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bundle.data.targets import target_of
from bundle.errors import InputError
from bundle.experiments.baselines import BASELINES
from bundle.experiments.statistics import finished_trials, pooled_scores, read_outcomes
from bundle.experiments.sweep import SITE, Sweep, plan_trials, read_sweep, refuse_shared_files, run_sweep
from bundle.experiments.trial import pretraining_options
from bundle.experiments.truth import painted_cohort, prepared_cohort
from bundle.files import slug, write_json, write_text
from bundle.pages import measure_name, number
from bundle.preparation.store import read_manifest
from bundle.process import run_config

logger = logging.getLogger(__name__)

PAIRS = Path("reidentification", "reidentification.csv")
TABLE = "<!-- tables of python -m scripts downstream -->"
"""Stands before and after the tables in a page."""


@dataclass(frozen=True)
class Plan:
    """What a plan's JSON file says; see the module."""

    results: str
    cohorts: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    sweep: Mapping[str, Any]


def read_plan(path: str | Path, results: str | None = None) -> Plan:
    """Read a plan's JSON file; `results` replaces its folder.

    Raises:
        InputError: it cannot be read, a task is of no cohort, or two would share files.
    """
    try:
        content = json.loads(Path(path).read_text())
        plan = Plan(**content | ({} if results is None else {"results": results}))
        unknown = {name: task["cohort"] for name, task in plan.tasks.items() if task["cohort"] not in plan.cohorts}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a plan ({error!r}); see configs/downstream.json for an example") from error
    if unknown:
        name, cohort = next(iter(unknown.items()))
        raise InputError(f"{path}: the task {name!r} is of the cohort {cohort!r}; there are {', '.join(plan.cohorts)}")
    for names in (plan.cohorts, plan.tasks):
        refuse_shared_files("entries", names)
    return plan


def run_plan(plan: Plan, workers: int = 1) -> list[str]:
    """Make the cohorts, run every task's sweep, and find whose scan is whose by each cohort's first pretraining.

    Args:
        plan: what to run.
        workers: trials at a time.

    Returns:
        What went wrong, one sentence per failed trial; empty if all are finished.
    """
    failures = []
    for cohort, made in plan.cohorts.items():
        store = _store(Path(plan.results) / "cohorts" / slug(cohort), made)
        for position, name in enumerate(_tasks_of(plan, cohort)):
            sweep = _sweep(plan, name, store)
            failed = run_sweep(sweep, workers)
            failures += [f"{name}: {failure}" for failure in failed]
            if position == 0 and not failed:
                _reidentify(sweep)
    return failures


def _tasks_of(plan: Plan, cohort: str) -> list[str]:
    return [name for name, task in plan.tasks.items() if task["cohort"] == cohort]


def _store(folder: Path, made: Mapping[str, Any]) -> Path:
    """A cohort's store; what is there is checked, and left as it is."""
    if "painted" in made:
        return painted_cohort(folder, **made["painted"])
    return prepared_cohort(folder, **made)


def _sweep(plan: Plan, name: str, store: Path) -> Sweep:
    """A task's sweep, which is kept as a file too."""
    own = {key: value for key, value in plan.tasks[name].items() if key != "cohort"}
    content = dict(plan.sweep) | own | {"store": str(store), "results": str(_results(plan, name))}
    runs = read_manifest(store)["runs"]
    predicted = {key: content[key] for key in ("target", "task", "classes") if key in content}
    kind = target_of(runs, **predicted, source=store).kind
    alone = predicted.get("target") == SITE or len({run["site"] for run in runs}) == 1
    content["baselines"] = [entry for entry in content["baselines"] if _suits(entry, kind, alone)]
    file = Path(plan.results) / "tasks" / f"{slug(name)}.json"
    write_json(file, content)
    return read_sweep(file)


def _suits(entry: Any, kind: str, alone: bool) -> bool:
    """Whether a baseline can be had; `alone`: sites tell nothing beside the target."""
    name = entry if isinstance(entry, str) else entry["baseline"]
    of_sites = name == SITE or (name != entry and "harmonise" in entry)
    return name not in BASELINES or (BASELINES[name].suits(kind) and not (alone and of_sites))


def _results(plan: Plan, name: str) -> Path:
    return Path(plan.results) / "tasks" / slug(name)


def _reidentify(sweep: Sweep) -> None:
    """Find whose scan is whose among the test subjects of a sweep's first pretraining, unless it is done."""
    trial = next(trial for trial in plan_trials(sweep) if trial.pretraining)
    options, folder = pretraining_options(trial), Path(trial.folder)
    if not (options["output_dir"] / PAIRS).is_file():
        configs = ["pretrain", *trial.strategy.overlays, "reidentify", *trial.configs]
        run_config("run", configs, options, folder / "log.txt")


def _found_pairs(plan: Plan) -> dict[str, pd.DataFrame]:
    """What `_reidentify` has found in each cohort."""
    found: dict[str, pd.DataFrame] = {}
    for cohort in plan.cohorts:
        for name in _tasks_of(plan, cohort)[:1]:
            for folder, _ in finished_trials(_results(plan, name)):
                if (folder / "pretrain" / PAIRS).is_file():
                    found[cohort] = pd.read_csv(folder / "pretrain" / PAIRS)
    return found


def write_tables(plan: Plan, page: str | Path | None = None, resamples: int = 2000) -> pd.DataFrame:
    """Write `downstream.csv` to the plan's results, and the tables into a page, between two lines `TABLE`.

    Args:
        plan: what was run.
        page: a Markdown file; None: only `downstream.md` beside the other is written.
        resamples: bootstrap resamples.

    Returns:
        Rows of `task`, `cohort`, `target`, `kind`, `method`, `baseline` (or a head), `measure`, `value`, `low`, `high`,
        `subjects`, `trained` (parameters, by gradients) and `seconds` (of training; of a baseline, altogether).

    Raises:
        InputError: a task has no finished trial, or the page lacks the two lines.
    """
    rows = pd.DataFrame([row for name in plan.tasks for row in _rows(plan, name, resamples)])
    write_text(Path(plan.results) / "downstream.csv", rows.to_csv(index=False, float_format="%.4f"))
    text = markdown(rows, _found_pairs(plan))
    write_text(Path(plan.results) / "downstream.md", text)
    if page is not None:
        before, after = around_tables(page)
        write_text(Path(page), f"{before}{TABLE}\n\n{text}\n{TABLE}{after}")
    return rows


def around_tables(page: str | Path) -> tuple[str, str]:
    """What stands before and after the tables of a page.

    Raises:
        InputError: it cannot be read, or lacks the two lines `TABLE`.
    """
    parts = Path(page).read_text().split(TABLE) if Path(page).is_file() else []
    if len(parts) != 3:
        raise InputError(f"{page}: no page with two lines {TABLE}, between which the tables are to stand")
    return parts[0], parts[2]


def _rows(plan: Plan, name: str, resamples: int) -> Iterator[dict[str, Any]]:
    """A task's rows, one per method and measure."""
    results = _results(plan, name)
    finished: dict[str, list[tuple[Path, dict]]] = {}
    for folder, record in finished_trials(results):
        finished.setdefault(record["strategy"], []).append((folder, record))
    for method, own in read_outcomes(results).items():
        trials = finished[method]
        baseline = trials[0][1]["kind"] == "baseline"
        stage = "test" if baseline else "train"
        facts = {
            "task": name,
            "cohort": plan.tasks[name]["cohort"],
            "target": own.task.column,
            "kind": own.task.kind,
            "method": method,
            "baseline": baseline,
            "subjects": len(own.participants),
            "trained": None if baseline else _trained(trials[0][0] / "log.txt"),
            "seconds": sum(record["seconds"][stage] for _, record in trials) / len(trials),
        }
        for measure, score in pooled_scores(own, resamples).items():
            yield facts | {"measure": measure} | {key: score[key] for key in ("value", "low", "high")}


def _trained(log: Path) -> int:
    """How many parameters were trained, as a trial's log says; 0 of a head that is fitted at once."""
    found = re.findall(r"Classifier: (\d+) of \d+ parameters are trained", log.read_text())
    return int(found[-1]) if found else 0


def markdown(rows: pd.DataFrame, pairs: Mapping[str, pd.DataFrame]) -> str:
    """The tables of a page: methods x tasks, by each task's first measure, and re-identification.

    Args:
        rows: as `write_tables` returns them.
        pairs: of each cohort what `bundle.experiments.reidentification.reidentify` returns.
    """
    first = rows.drop_duplicates(["task", "method"]).sort_values("baseline", kind="stable")
    scores = first.assign(cell=_with_limits(first, "value")).pivot(index="method", columns="task", values="cell")
    tasks = rows.drop_duplicates("task").set_index("task")
    table = scores.loc[first["method"].unique(), tasks.index].fillna("")
    table.columns = pd.Index([f"{name}: {measure_name(measure)}" for name, measure in tasks["measure"].items()])
    by_method = first.groupby("method")
    table["trained parameters"], table["seconds"] = by_method["trained"].agg(_span), by_method["seconds"].agg(_span)
    baselines = first.loc[first["baseline"], "method"].unique()
    table = table.rename(index={name: f"*{name}*" for name in baselines})
    subjects = ", ".join(f"{name} {count}" for name, count in tasks["subjects"].items())
    text = f"{_grid(table)}\nTest subjects: {subjects}. Baselines in italics.\n"
    if not pairs:
        return text
    found = pd.concat([own.assign(column=cohort) for cohort, own in pairs.items()])
    found["column"] += ", rank " + found["rank"].astype(str)
    found["cell"] = _with_limits(found, "share")
    columns, features = found["column"].unique(), found["features"].unique()
    table = found.pivot(index="features", columns="column", values="cell").loc[features, columns]
    table.loc["*chance*"] = found.drop_duplicates("column").set_index("column")["chance"].map("{:.2f}".format)
    return f"{text}\n{_grid(table.rename_axis(index='whose scan is it: share found by'))}"


def _with_limits(rows: pd.DataFrame, value: str) -> list[str]:
    numbers = rows[[value, "low", "high"]].map(number, digits=2)
    return [f"{middle} [{low}, {high}]" for middle, low, high in numbers.to_numpy()]


def _span(values: pd.Series) -> str:
    """The least and the largest of some numbers, or the one that they all are, whole; nothing of none."""
    known = values.dropna().round().astype(int)
    return " to ".join(map(str, dict.fromkeys([known.min(), known.max()]))) if len(known) else ""


def _grid(table: pd.DataFrame) -> str:
    """A table in Markdown, its index first."""
    lines = [[table.index.name, *table.columns], ["---", *["--:"] * table.shape[1]]]
    lines += [[name, *cells] for name, cells in zip(table.index, table.to_numpy(), strict=True)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
