"""Scores of strategies over all folds and seeds, with intervals over subjects, and paired tests against a reference.

Every subject is tested once per seed. Accuracies and errors are pooled over the folds. An AUROC counts pairs of
subjects of the same fold only, since outputs of networks of different folds need not be on one scale; with one fold it
is the usual AUROC. Scores are averaged over seeds before anything is resampled: the unit of resampling is the subject.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import permutation_test, rankdata
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from tqdm.auto import tqdm

from bundle.errors import InputError
from bundle.evaluation.subjects import site_by_site, with_intervals, within_sites
from bundle.tasks.kinds import task_from
from bundle.tasks.scores import measure
from bundle.tasks.task import Results, Task, pairs_above

logger = logging.getLogger(__name__)

REFERENCE = "random_tube"


@dataclass(frozen=True)
class Outcomes:
    """Test results of one strategy.

    Attributes:
        task: what was predicted.
        participants: names, sorted.
        sites: of each, (n,).
        tested: results of each, whose groups are the folds in which they were tested.
    """

    task: Task
    participants: list[str]
    sites: NDArray[np.str_]
    tested: Results

    @property
    def folds(self) -> NDArray[np.str_]:
        """Fold in which each was tested, (n,)."""
        return self.tested.groups

    @property
    def seeds(self) -> int:
        """How many networks have tested each."""
        return self.tested.outputs.shape[1]

    def select(self, participants: list[str]) -> "Outcomes":
        """The same for some of the participants."""
        position = {name: row for row, name in enumerate(self.participants)}
        rows = [position[name] for name in participants]
        own = self.tested
        tested = Results(own.labels[rows], own.outputs[rows], own.groups[rows], own.thresholds[rows])
        return Outcomes(self.task, participants, self.sites[rows], tested)


def outcomes(rows: pd.DataFrame, task: Task) -> Outcomes:
    """Arrange rows of `participant_id`, `site`, `label`, `fold`, `seed`, `threshold` and the task's columns.

    Seeds that lack a participant whom another seed has (an unfinished trial) are left out with a warning.
    """
    columns = [*task.columns, "threshold"]
    wide = rows.pivot(index="participant_id", columns="seed", values=columns).sort_index()
    whole = [seed for seed in wide[columns[0]] if not wide[columns[0]][seed].isna().any()]
    if len(whole) < wide[columns[0]].shape[1]:
        logger.warning(
            "%d of %d seeds miss participants and are left out",
            wide[columns[0]].isna().any().sum(),
            wide[columns[0]].shape[1],
        )
    if not whole:
        raise InputError("no seed has tested all participants that another has; finish the sweep")
    people = rows.drop_duplicates("participant_id").set_index("participant_id").loc[wide.index]
    outputs = np.stack([wide[name][whole].to_numpy(float) for name in task.columns], axis=-1)
    thresholds = wide["threshold"][whole].to_numpy(float)
    tested = Results(people["label"].to_numpy(float), outputs, people["fold"].to_numpy(str), thresholds)
    return Outcomes(task, list(wide.index), people["site"].to_numpy(str), tested)


def pooled_scores(own: Outcomes, resamples: int = 2000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Each measure with its 95 % interval over subjects (see `with_intervals`); `seed_sd` over seeds.

    Returns:
        `{measure: {"value", "low", "high", "seed_sd"}}`, NaN where there are too few subjects; the one that is taken
        within sites is among them where there are several.
    """
    scores = with_intervals(own.task, own.tested, resamples, seed)
    if len(np.unique(own.sites)) > 1:
        scores |= within_sites(own.task, own.tested, own.sites, resamples, seed)
    within = f"{own.task.within}_within_site"
    single = []
    for number in range(own.seeds):
        one = _of_seed(own.tested, number)
        apart = measure(own.task, site_by_site(one, own.sites))[own.task.within]
        single.append(measure(own.task, one) | {within: apart})
    for metric, score in scores.items():
        values = [found[metric] for found in single]
        score["seed_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return scores


def _of_seed(tested: Results, number: int) -> Results:
    one = slice(number, number + 1)
    return replace(tested, outputs=tested.outputs[:, one], thresholds=tested.thresholds[:, one])


def rank_p_value(first: Outcomes, second: Outcomes, resamples: int = 2000, seed: int = 0) -> float:
    """Paired permutation test of two strategies' AUROC (of several classes: its mean) on the same subjects, two-sided.

    Under the null hypothesis a subject's ranks under the two strategies can be swapped (Venkatraman & Begg 1996,
    Biometrika 83:835). Ranks are within fold and seed, so that the strategies' scales do not matter.

    Args:
        first: a strategy.
        second: another, with the same participants in the same folds.
        resamples: random swaps.
        seed: of the swaps.

    Returns:
        p, NaN where no fold holds two classes.
    """
    pairs = zip(first.task.rankings(first.tested), second.task.rankings(second.tested), strict=True)
    tables = [_swappable(first.folds, one, other, positive) for (one, positive), (other, _) in pairs]
    if not tables or not all(weights.any() for *_, weights in tables):
        return float("nan")

    def auroc(strategy: NDArray) -> NDArray:
        """The mean AUROC if each subject's score comes from the strategy 0 or 1: (..., n) to (...)."""
        found = []
        for agree, positive, weights in tables:
            of_first = [(strategy[..., positive] == k).astype(float) for k in (0, 1)]
            of_rest = [(strategy[..., ~positive] == k).astype(float) for k in (0, 1)]
            parts = ((of_first[i] @ agree[i][j] * of_rest[j]).sum(-1) for i in (0, 1) for j in (0, 1))
            found.append(sum(parts) / weights.sum())
        return np.mean(found, axis=0)

    def difference(x: NDArray, y: NDArray, axis: int) -> NDArray:
        return np.round(auroc(x) - auroc(y), 12)  # the order of summation makes no difference into one

    labels = (np.zeros(len(first.participants)), np.ones(len(first.participants)))
    return _permuted(labels, difference, resamples, seed)


def _permuted(samples: tuple[NDArray, NDArray], statistic: Callable, resamples: int, seed: int) -> float:
    """The p-value of a paired permutation test, two-sided."""
    rng = np.random.default_rng(seed)
    found = permutation_test(
        samples, statistic, permutation_type="samples", vectorized=True, n_resamples=resamples, rng=rng
    )
    return float(found.pvalue)


def _swappable(
    folds: NDArray[np.str_], first: NDArray, second: NDArray, positive: NDArray[np.bool_]
) -> tuple[list[list[NDArray]], NDArray[np.bool_], NDArray]:
    """How often positives rank above others, (positives, others), for either strategy of either; who; and the weights.

    Args:
        folds: of each subject, (n,).
        first: scores of one strategy, (n, s).
        second: of the other.
        positive: who should score higher, (n,).
    """
    ranks = [_ranks(folds, scores) for scores in (first, second)]
    weights = (folds[positive][:, None] == folds[~positive][None]).astype(float)
    agree = [
        [weights * _concordance(a[positive], b[~positive], across=i != j) for j, b in enumerate(ranks)]
        for i, a in enumerate(ranks)
    ]
    return agree, positive, weights


def _concordance(first: NDArray, second: NDArray, across: bool) -> NDArray[np.float64]:
    """Share of seeds in which one scores above another (ties count half): (n, s), (m, s) to a table.

    With `across`, the two come from different strategies: every seed of one meets every seed of the other.
    """
    pairs = [(a, b) for a in first.T for b in second.T] if across else list(zip(first.T, second.T, strict=True))
    return np.sum([pairs_above(a, b) for a, b in pairs], axis=0) / len(pairs)


def _ranks(folds: NDArray[np.str_], scores: NDArray) -> NDArray[np.float64]:
    """Rank of each subject within its fold, 0 to 1, per seed."""
    ranks = np.empty_like(scores)
    for fold in np.unique(folds):
        rows = folds == fold
        ranks[rows] = rankdata(scores[rows], axis=0) / rows.sum()
    return ranks


def mean_p_value(first: Outcomes, second: Outcomes, metric: str, resamples: int = 2000, seed: int = 0) -> float:
    """Paired test of a measure to which each subject adds its part: a permutation over subjects.

    Of being right or wrong, with one seed each, it is McNemar's exact test.
    """
    a, b = (own.task.gains(own.tested, metric) for own in (first, second))
    assert a is not None, metric
    assert b is not None, metric
    if first.seeds == second.seeds == 1 and {*a, *b} <= {0.0, 1.0}:
        table = [[np.sum((a == i) & (b == j)) for j in (1, 0)] for i in (1, 0)]
        return float(mcnemar(table, exact=True).pvalue)

    def difference(x: NDArray, y: NDArray, axis: int) -> NDArray:
        return np.round((x - y).mean(axis), 12)  # ties are ties, in whatever order it is summed

    return _permuted((a, b), difference, resamples, seed)


def compare(
    tested: dict[str, Outcomes], reference: str = REFERENCE, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row per strategy: pooled scores, and the difference to the reference with p-values corrected by Holm.

    The correction is over all strategies compared, for each measure. A comparison is over the subjects that both have.

    Returns:
        Columns `strategy`, `subjects`, `seeds`; for each measure `M` the columns `M`, `M_low`, `M_high`, `M_seed_sd`;
        and for the task's `compared` ones `M_difference`, `M_p`, `M_p_holm` (NaN for the reference, and for all where
        it was not run).
    """
    rows = []
    for name, own in tqdm(tested.items(), desc="intervals and tests", unit="strategy"):
        row: dict[str, Any] = {"strategy": name, "subjects": len(own.participants), "seeds": own.seeds}
        for metric, score in pooled_scores(own, resamples, seed).items():
            row |= {metric if key == "value" else f"{metric}_{key}": value for key, value in score.items()}
        if reference in tested and name != reference:
            row |= _paired(own, tested[reference], resamples, seed)
        rows.append(row)
    table = pd.DataFrame(rows)
    for metric in next(iter(tested.values())).task.compared:
        for column in (f"{metric}_difference", f"{metric}_p"):
            table[column] = table.get(column, pd.Series(np.nan, table.index))
        known = table[f"{metric}_p"].notna()
        table[f"{metric}_p_holm"] = np.nan
        if known.any():
            table.loc[known, f"{metric}_p_holm"] = multipletests(table.loc[known, f"{metric}_p"], method="holm")[1]
    return table


def _paired(own: Outcomes, other: Outcomes, resamples: int, seed: int) -> dict[str, float]:
    common = sorted(set(own.participants) & set(other.participants))
    first, second = own.select(common), other.select(common)
    if not common or not np.array_equal(first.folds, second.folds):
        return {}
    if not np.array_equal(first.tested.labels, second.tested.labels):  # labels were shuffled: a control, and no rival
        return {}
    scores = [measure(one.task, one.tested) for one in (first, second)]
    found = {}
    for metric in own.task.compared:
        found[f"{metric}_difference"] = scores[0][metric] - scores[1][metric]
        ranked = own.task.gains(first.tested, metric) is None
        p_value = rank_p_value if ranked else partial(mean_p_value, metric=metric)
        found[f"{metric}_p"] = p_value(first, second, resamples=resamples, seed=seed)
    return found


def read_outcomes(results: str | Path) -> dict[str, Outcomes]:
    """Test results of every strategy in a results folder, from its finished trials.

    Raises:
        InputError: no trial is finished.
    """
    tables: dict[str, list[pd.DataFrame]] = {}
    tasks: list[dict[str, Any]] = []
    for folder, record in finished_trials(results):
        scores = json.loads((folder / "scores.json").read_text())
        tasks.append(scores["task"])
        table = pd.read_csv(folder / "subjects.tsv", sep="\t", dtype={"participant_id": str, "site": str})
        table = table.assign(threshold=scores["threshold"], fold=record["fold"], seed=record["seed"])
        tables.setdefault(record["strategy"], []).append(table)
    if not tables:
        raise InputError(f"{results}: no trial is finished; run `python -m scripts sweep` first")
    task = task_from(tasks[0])
    return {name: outcomes(pd.concat(parts), task) for name, parts in tables.items()}


def finished_trials(results: str | Path) -> list[tuple[Path, dict]]:
    """Folder and `trial.json` of the finished trials that belong to the results' plan, in the plan's order."""
    results = Path(results)
    try:
        plan = json.loads((results / "sweep.json").read_text())["trials"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{results}: not a folder of results ({error}); run `python -m scripts sweep`") from error
    trials = []
    for name, sha256 in plan.items():
        path = results / "trials" / name / "trial.json"
        record = json.loads(path.read_text()) if path.is_file() else {"finished": False}
        if record["finished"] and record["sha256"] == sha256:
            trials.append((path.parent, record))
    return trials
