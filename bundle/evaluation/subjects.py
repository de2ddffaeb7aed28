"""The final test: once, over subjects, with intervals, at a threshold fixed on the validation set."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from monai.engines import Evaluator, SupervisedEvaluator
from numpy.typing import NDArray

from bundle.evaluation.intervals import bootstrap_interval, clopper_pearson_lower
from bundle.files import write_bytes, write_json, write_text
from bundle.pages import png
from bundle.preparation.store import read_manifest
from bundle.tasks.scores import SubjectScores, measure, once_tested
from bundle.tasks.task import Results, Task
from bundle.training.checkpoints import state_of, weights_sha256

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]
"""Of each measure `{"value", "low", "high"}`."""


def score_table(task: Task, tested: Results, sites: NDArray[np.str_], resamples: int, seed: int) -> Scores:
    """Measures of one test set with 95 % intervals over subjects, see `with_intervals`.

    Args:
        task: what is predicted. Where one class is absent, as at a small site left out, what compares classes has no
            value, and nothing has limits.
        tested: the test subjects.
        sites: of each, (n,).
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        For each measure `{"value", "low", "high"}`; the one of `Task.within` within sites, whose name ends on
        `_within_site`, where there are several; and what an answer without any input scores.
    """
    table = with_intervals(task, tested, resamples, seed)
    if len(np.unique(sites)) > 1:
        table |= within_sites(task, tested, sites, resamples, seed)
    fixed = task.reference(tested.labels).items()
    return table | {name: {"value": value, "low": value, "high": value} for name, value in fixed}


def within_sites(task: Task, tested: Results, sites: NDArray[np.str_], resamples: int, seed: int) -> Scores:
    """The measure of `Task.within` over subjects of the same fold *and* site, so that sites themselves add nothing."""
    apart = with_intervals(task, site_by_site(tested, sites), resamples, seed)
    return {f"{task.within}_within_site": apart[task.within]}


def site_by_site(tested: Results, sites: NDArray[np.str_]) -> Results:
    """The same subjects, compared within their fold and site alone."""
    groups = [f"{group}|{site}" for group, site in zip(tested.groups, sites, strict=True)]
    return replace(tested, groups=np.array(groups))


def with_intervals(task: Task, tested: Results, resamples: int, seed: int) -> Scores:
    """The task's measures with their 95 % expanded percentile bootstrap intervals, the classes resampled apart.

    The smallest class's size stands for the number of subjects (see `bundle.evaluation.intervals`), which is on the
    safe side. A score of 1 in every resample would have the limits 1 and 1. Its lower limit is the exact one of Clopper
    and Pearson for as many independent trials as the task says: of an AUROC for as many as there are disjoint pairs of
    a case and a control, since all of these are right with a probability of at most score^pairs. A score of 0 is
    treated alike. Another score that no resample changes, as of a constant answer, keeps limits equal to its value.

    Args:
        task: what is predicted.
        tested: the test subjects.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        `{"value", "low", "high"}` of each; the limits are NaN where a class has fewer than two subjects.
    """
    measures, strata, n = task.measures(tested), task.strata(tested.labels), len(tested.labels)

    def statistic(*drawn: NDArray, axis: int) -> NDArray:
        """The measures (m, ...) of each stratum's subjects drawn by position, (..., size) each."""
        found = []
        for row in np.ndindex(drawn[0].shape[:-1]):
            found.append(np.bincount(np.concatenate([part[row] for part in drawn]), minlength=n))
        counts = np.reshape(found, (*drawn[0].shape[:-1], n)).astype(float)
        return np.moveaxis(measures(counts), -1, 0)

    ends = bootstrap_interval(strata, statistic, resamples, seed)
    low, high = (np.broadcast_to(end, len(task.metrics)).tolist() for end in ends)
    trials, values = task.trials(tested), measure(task, tested)
    table = {}
    for position, name in enumerate(task.metrics):
        if name in trials and low[position] == 1:
            low[position] = clopper_pearson_lower(trials[name])
        if name in trials and high[position] == 0:
            high[position] = 1 - clopper_pearson_lower(trials[name])
        table[name] = {"value": values[name], "low": low[position], "high": high[position]}
    return table


def evaluate(
    validator: Evaluator,
    tester: SupervisedEvaluator,
    validation_scores: SubjectScores,
    test_scores: SubjectScores,
    store: str | Path,
    output_dir: str | Path,
    resamples: int = 2000,
    seed: int = 0,
) -> Scores:
    """Fix the threshold on the validation set, test once, and write `subjects.tsv`, `scores.json` and a picture.

    Args:
        validator: evaluator over the validation set, with `validation_scores` attached.
        tester: evaluator over the test set, with `test_scores` attached.
        validation_scores: subject scores of the validation set.
        test_scores: subject scores of the test set.
        store: the prepared store, which knows the subjects' sites.
        output_dir: folder of the files.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        The table of `score_table` for the test set.
    """
    weights = weights_sha256(state_of({"network": tester.network})["network"])
    validator.run()
    tester.run()
    sites = {run["participant_id"]: str(run["site"]) for run in read_manifest(store)["runs"]}
    task, subjects = test_scores.task, test_scores.subjects
    subjects.insert(1, "site", [sites[name] for name in subjects["participant_id"]])
    return write_test_scores(task, validation_scores.subjects, subjects, output_dir, resamples, seed, weights=weights)


def write_test_scores(
    task: Task,
    validation: pd.DataFrame,
    subjects: pd.DataFrame,
    output_dir: str | Path,
    resamples: int = 2000,
    seed: int = 0,
    threshold: float | None = None,
    weights: str | None = None,
) -> Scores:
    """Score the test subjects at the validation set's threshold; write `subjects.tsv`, `scores.json`, `scores.png`.

    Args:
        task: what is predicted.
        validation: `label` and the task's columns of each validation subject.
        subjects: `participant_id`, `site`, `label` and the task's columns of each test subject.
        output_dir: folder of the files.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.
        threshold: to use instead of the one that is best on the validation set.
        weights: hash of the network that was tested, see `bundle.training.checkpoints.weights_sha256`.

    Returns:
        The table of `score_table` for the test set.
    """
    if threshold is None:
        threshold = task.threshold(*(validation[part].to_numpy(float) for part in ("label", list(task.columns))))
    tested = once_tested(subjects, task, threshold)
    table = score_table(task, tested, subjects["site"].to_numpy(str), resamples, seed)
    output_dir = Path(output_dir)
    write_text(output_dir / "subjects.tsv", task.table(subjects, threshold).to_csv(sep="\t", index=False))
    summary = {
        "task": task.facts(),
        "subjects": len(subjects),
        "threshold": threshold,
        "bootstrap_seed": seed,
        "scores": table,
    }
    summary |= {} if weights is None else {"weights_sha256": weights}
    write_json(output_dir / "scores.json", summary)
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    task.draw(figure.add_subplot(), tested)
    write_bytes(output_dir / "scores.png", png(figure, 110))
    log_scores(table, len(subjects))
    return table


def log_scores(table: Mapping[str, Mapping[str, float]], subjects: int) -> None:
    """One line per measure."""
    for name, score in table.items():
        logger.info(
            "Test, %d subjects: %s %.3f (95%% interval %.3f to %.3f)",
            subjects, name, score["value"], score["low"], score["high"],
        )  # fmt: skip
