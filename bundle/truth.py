"""The truth test: is a planted effect found, and is nothing found where nothing is planted?"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from bundle.prepare import prepare
from bundle.sources import find_runs
from bundle.statistics import pooled_scores, read_outcomes
from bundle.store import write_text
from bundle.sweep import Sweep, run_sweep
from bundle.synthetic import make_cohort

logger = logging.getLogger(__name__)


def prepared_cohort(folder: Path, subjects: int, effect: float, seed: int) -> Path:
    """Make a synthetic cohort in a folder, prepare it, and return its store."""
    source = make_cohort(folder / "derivatives", subjects=subjects, effect=effect, seed=seed, duration_s=120.0)
    prepare(find_runs(source), folder / "store")
    return folder / "store"


def truth_test(
    folder: str | Path,
    sweep: Sweep,
    effects: Sequence[float] = (0.0, 2.0),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    subjects: int = 48,
    resamples: int = 2000,
    cohort: Callable[[Path, int, float, int], Path] = prepared_cohort,
) -> pd.DataFrame:
    """Run a sweep on cohorts with and without an effect; what is finished is not run again.

    Writes ``truth.csv`` (AUROC of each strategy on each cohort) and ``truth_summary.json``.

    Args:
        folder: where the cohorts and results go.
        sweep: what to run on each cohort; its store and results are replaced.
        effects: planted effects, Cohen's d; 0 plants none.
        seeds: of the cohorts.
        subjects: size of each cohort.
        resamples: bootstrap resamples.
        cohort: makes a cohort's store, from folder, subjects, effect and seed.

    Returns:
        Rows of ``effect``, ``seed``, ``strategy``, ``value``, ``low``, ``high`` of the AUROC.
    """
    folder = Path(folder)
    rows = []
    for effect in effects:
        for seed in seeds:
            place = folder / f"effect-{effect:g}_seed-{seed}"
            store = cohort(place, subjects, float(effect), seed)
            failures = run_sweep(replace(sweep, store=str(store), results=str(place / "results")))
            for failure in failures:
                logger.error("%s: %s", place.name, failure)
            for strategy, own in read_outcomes(place / "results").items():
                score = pooled_scores(own, resamples, seed)["auroc"]
                rows.append({"effect": effect, "seed": seed, "strategy": strategy} | score)
    table = pd.DataFrame(rows)
    write_text(folder / "truth.csv", table.to_csv(index=False))
    write_text(folder / "truth_summary.json", json.dumps(summarise(table).to_dict("records"), indent=1) + "\n")
    return table


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the cohorts whose interval lies above chance (power, or false alarms at effect 0) or covers it."""
    marked = table.assign(above=table["low"] > 0.5, covers=(table["low"] <= 0.5) & (table["high"] >= 0.5))
    groups = marked.groupby(["strategy", "effect"], sort=False)
    return groups.agg(
        cohorts=("seed", "size"),
        mean_auroc=("value", "mean"),
        share_above_chance=("above", "mean"),
        share_covering_chance=("covers", "mean"),
    ).reset_index()
