"""The truth test: is a planted effect found, and is nothing found where nothing is planted?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from bundle.errors import InputError
from bundle.experiments.painted import paint
from bundle.experiments.statistics import pooled_scores, read_outcomes
from bundle.experiments.sweep import Sweep, run_sweep
from bundle.experiments.synthetic import EFFECTS, make_cohort
from bundle.files import write_json, write_text
from bundle.preparation.prepare import prepare, refuse_failed_rows
from bundle.preparation.sources import find_runs
from bundle.preparation.sources.participants import Labels


def prepared_cohort(
    folder: Path, subjects: int, planted: str, effect: float, seed: int, duration_s: float = 60.0
) -> Path:
    """Make a synthetic cohort in a folder, prepare it, and return its store."""
    effect_on, size = ("coupling", 0.0) if planted == "nothing" else (planted, effect)
    source = make_cohort(folder / "derivatives", subjects, size, seed, duration_s=duration_s, effect_on=effect_on)
    return prepared(source, folder / "store")


def painted_cohort(folder: Path, **painted: Any) -> Path:
    """Paint real time courses in a folder by the other arguments of `paint`, prepare them, and return the store."""
    return prepared(paint(folder=folder / "derivatives", **painted), folder / "store")


def prepared(source: Path, store: Path, labels: Labels = "required") -> Path:
    """Prepare a cohort's images, and return the store; half a cohort is no test, so a failed run is an error."""
    refuse_failed_rows(prepare(find_runs(source, labels), store)["rows"])
    return store


def truth_test(
    folder: str | Path,
    sweep: Sweep,
    planted: Sequence[str] = ("nothing", *EFFECTS),
    effect: float = 2.0,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    subjects: int = 48,
    resamples: int = 2000,
    cohort: Callable[[Path, int, str, float, int], Path] = prepared_cohort,
    workers: int = 1,
) -> pd.DataFrame:
    """Run a sweep on cohorts with and without an effect; what is finished is not run again.

    Writes `truth.csv` (AUROC of each strategy on each cohort) and `truth_summary.json`.

    Args:
        folder: where the cohorts and results go.
        sweep: what to run on each cohort; its store and results are replaced.
        planted: "nothing", or what the diagnosis changes; see `bundle.experiments.synthetic`.
        effect: size of the planted effects, Cohen's d.
        seeds: of the cohorts.
        subjects: size of each cohort.
        resamples: bootstrap resamples.
        cohort: makes a cohort's store, from folder, subjects, planted, effect and seed.
        workers: trials at a time.

    Returns:
        Rows of `planted`, `seed`, `strategy`, `value`, `low`, `high` of the AUROC.

    Raises:
        InputError: `planted` names something else, or trials have failed: half a table is no test.
    """
    folder = Path(folder)
    unknown = set(planted) - {"nothing", *EFFECTS}
    if unknown:
        raise InputError(f"planted is nothing, {' or '.join(EFFECTS)}, not {sorted(unknown)[0]!r}")
    rows, failures = [], []
    for seed in seeds:
        for what in planted:
            place = folder / f"{what}_seed-{seed}"
            store = cohort(place, subjects, what, float(effect), seed)
            failed = run_sweep(replace(sweep, store=str(store), results=str(place / "results")), workers)
            failures += [f"{place.name}: {failure}" for failure in failed]
            if failed:  # the other cohorts go on, but no table will be made
                continue
            for strategy, own in read_outcomes(place / "results").items():
                score = pooled_scores(own, resamples, seed)["auroc"]
                rows.append({"planted": what, "seed": seed, "strategy": strategy} | score)
    if failures:
        raise InputError(f"{len(failures)} trials failed; run again to go on. " + "; ".join(failures))
    table = pd.DataFrame(rows)
    write_text(folder / "truth.csv", table.to_csv(index=False, float_format="%.4f"))
    write_json(folder / "truth_summary.json", summarise(table).to_dict("records"))
    return table


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the cohorts whose interval lies above chance (power, or false alarms at effect 0) or covers it."""
    marked = table.assign(above=table["low"] > 0.5, covers=(table["low"] <= 0.5) & (table["high"] >= 0.5))
    groups = marked.groupby(["strategy", "planted"], sort=False)
    return groups.agg(
        cohorts=("seed", "size"),
        mean_auroc=("value", "mean"),
        share_above_chance=("above", "mean"),
        share_covering_chance=("covers", "mean"),
    ).reset_index()
