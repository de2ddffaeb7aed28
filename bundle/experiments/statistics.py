"""Scores of strategies over all folds and seeds, with intervals over subjects, and paired tests against a reference.

Every subject is tested once per seed. Accuracies are pooled over the folds. The AUROC counts pairs of a case and a
control of the same fold only, since logits of networks of different folds need not be on one scale; with one fold it is
the usual AUROC. Scores are averaged over seeds before anything is resampled: the unit of resampling is the subject.
"""

import json
import logging
from dataclasses import dataclass, replace
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
from bundle.evaluation.subjects import with_intervals

logger = logging.getLogger(__name__)

REFERENCE = "random_tube"
METRICS = ("auroc", "balanced_accuracy", "accuracy")


@dataclass(frozen=True)
class Outcomes:
    """Test results of one strategy: n subjects, each tested once by each of s seeds.

    Attributes:
        participants: names, sorted.
        labels: 1 case, 0 control, (n,).
        folds: fold in which each was tested, (n,).
        margins: logit minus the fold's threshold, (n, s): above 0 is called a case.
    """

    participants: list[str]
    labels: NDArray[np.int64]
    folds: NDArray[np.str_]
    margins: NDArray[np.float64]

    @property
    def correct(self) -> NDArray[np.float64]:
        """Share of seeds that are right about each subject, (n,)."""
        return ((self.margins > 0) == (self.labels[:, None] == 1)).mean(1)

    def select(self, participants: list[str]) -> "Outcomes":
        """The same for some of the participants."""
        position = {name: row for row, name in enumerate(self.participants)}
        rows = [position[name] for name in participants]
        return Outcomes(participants, self.labels[rows], self.folds[rows], self.margins[rows])


def outcomes(rows: pd.DataFrame) -> Outcomes:
    """Arrange rows of `participant_id`, `label`, `fold`, `seed` and `margin` of one strategy.

    Seeds that lack a participant whom another seed has (an unfinished trial) are left out with a warning.
    """
    wide = rows.pivot(index="participant_id", columns="seed", values="margin").sort_index()
    complete = wide.dropna(axis=1)
    if complete.shape[1] < wide.shape[1]:
        logger.warning("%d of %d seeds miss participants and are left out", (wide.isna().any()).sum(), wide.shape[1])
    if complete.shape[1] == 0:
        raise InputError("no seed has tested all participants that another has; finish the sweep")
    people = rows.drop_duplicates("participant_id").set_index("participant_id").loc[complete.index]
    return Outcomes(
        list(complete.index), people["label"].to_numpy(), people["fold"].to_numpy(str), complete.to_numpy(float)
    )


def pooled_scores(tested: Outcomes, resamples: int = 2000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Each metric with its 95 % interval over subjects (see `with_intervals`); `seed_sd` over seeds.

    Returns:
        `{metric: {"value", "low", "high", "seed_sd"}}`, NaN where there are too few subjects.
    """
    cases, controls = np.flatnonzero(tested.labels == 1), np.flatnonzero(tested.labels == 0)
    above = _concordance(tested.margins[cases], tested.margins[controls])
    weights = _same_fold(tested, cases, controls)
    values = {metric: metric_of(tested, metric) for metric in METRICS}
    scores = with_intervals(values, tested.labels, tested.correct, above, weights, resamples, seed)
    for metric, score in scores.items():
        single = [metric_of(replace(tested, margins=margins[:, None]), metric) for margins in tested.margins.T]
        score["seed_sd"] = float(np.std(single, ddof=1)) if len(single) > 1 else float("nan")
    return scores


def metric_of(tested: Outcomes, metric: str) -> float:
    """One metric of `METRICS`, the mean over seeds; NaN where one class is absent, but for the accuracy."""
    cases, controls = np.flatnonzero(tested.labels == 1), np.flatnonzero(tested.labels == 0)
    if metric == "accuracy":
        return float(tested.correct.mean())
    if min(len(cases), len(controls)) == 0:
        return float("nan")
    if metric == "balanced_accuracy":
        return float(tested.correct[cases].mean() + tested.correct[controls].mean()) / 2
    agree = _concordance(tested.margins[cases], tested.margins[controls])
    return _weighted_mean(agree, _same_fold(tested, cases, controls))


def _same_fold(tested: Outcomes, cases: NDArray, controls: NDArray) -> NDArray[np.float64]:
    return (tested.folds[cases][:, None] == tested.folds[controls][None]).astype(float)


def _concordance(cases: NDArray, controls: NDArray, across: bool = False) -> NDArray[np.float64]:
    """Share of seeds in which a case scores above a control (ties count half): (cases, s), (controls, s) to a table.

    With `across`, the two come from different strategies: every seed of one meets every seed of the other.
    """
    pairs = [(a, b) for a in cases.T for b in controls.T] if across else list(zip(cases.T, controls.T, strict=True))
    total = np.zeros((len(cases), len(controls)))
    for a, b in pairs:
        total += (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
    return total / len(pairs)


def _weighted_mean(values: NDArray, weights: NDArray) -> float:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else float("nan")


def auroc_p_value(first: Outcomes, second: Outcomes, resamples: int = 2000, seed: int = 0) -> float:
    """Paired permutation test of two strategies' AUROC on the same subjects, two-sided.

    Under the null hypothesis a subject's ranks under the two strategies can be swapped (Venkatraman & Begg 1996,
    Biometrika 83:835). Ranks are within fold and seed, so that the strategies' scales do not matter.

    Args:
        first: a strategy.
        second: another, with the same participants in the same folds.
        resamples: random swaps.
        seed: of the swaps.

    Returns:
        p, NaN where no fold holds both classes.
    """
    ranks = [_ranks(first), _ranks(second)]
    cases, controls = np.flatnonzero(first.labels == 1), np.flatnonzero(first.labels == 0)
    weights = _same_fold(first, cases, controls)
    agree = [
        [weights * _concordance(a[cases], b[controls], across=i != j) for j, b in enumerate(ranks)]
        for i, a in enumerate(ranks)
    ]

    if not weights.any():
        return float("nan")

    def auroc(strategy: NDArray) -> NDArray:
        """AUROC if each subject's score comes from the strategy 0 or 1: (..., n) to (...)."""
        of_case = [(strategy[..., cases] == k).astype(float) for k in (0, 1)]
        of_control = [(strategy[..., controls] == k).astype(float) for k in (0, 1)]
        return sum((of_case[i] @ agree[i][j] * of_control[j]).sum(-1) for i in (0, 1) for j in (0, 1)) / weights.sum()

    def difference(x: NDArray, y: NDArray, axis: int) -> NDArray:
        return np.round(auroc(x) - auroc(y), 12)  # the order of summation makes no difference into one

    labels = (np.zeros(len(first.labels)), np.ones(len(first.labels)))
    return float(
        permutation_test(
            labels,
            difference,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def _ranks(tested: Outcomes) -> NDArray[np.float64]:
    """Rank of each subject within its fold, 0 to 1, per seed."""
    ranks = np.empty_like(tested.margins)
    for fold in np.unique(tested.folds):
        rows = tested.folds == fold
        ranks[rows] = rankdata(tested.margins[rows], axis=0) / rows.sum()
    return ranks


def accuracy_p_value(first: Outcomes, second: Outcomes, resamples: int = 2000, seed: int = 0) -> float:
    """Paired test of two strategies' accuracy: exact McNemar with one seed each, else a permutation over subjects."""
    if first.margins.shape[1] == second.margins.shape[1] == 1:
        a, b = first.correct == 1, second.correct == 1
        table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
        return float(mcnemar(table, exact=True).pvalue)
    return float(
        permutation_test(
            (first.correct, second.correct),
            lambda x, y, axis: np.round(np.mean(x - y, axis=axis), 12),  # ties are ties, in whatever order it is summed
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def compare(
    tested: dict[str, Outcomes], reference: str = REFERENCE, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """One row per strategy: pooled scores, and the difference to the reference with p-values corrected by Holm.

    The correction is over all strategies compared, for each metric. A comparison is over the subjects that both have.

    Returns:
        Columns `strategy`, `subjects`, `cases`, `seeds`; for each metric `M` the columns `M`, `M_low`,
        `M_high`, `M_seed_sd`; and for AUROC and accuracy `M_difference`, `M_p`, `M_p_holm` (NaN for the
        reference, and for all where it was not run).
    """
    rows = []
    for name, own in tqdm(tested.items(), desc="intervals and tests", unit="strategy"):
        row: dict[str, Any] = {"strategy": name, "subjects": len(own.labels), "cases": int(own.labels.sum())}
        row["seeds"] = own.margins.shape[1]
        for metric, score in pooled_scores(own, resamples, seed).items():
            row |= {metric if key == "value" else f"{metric}_{key}": value for key, value in score.items()}
        if reference in tested and name != reference:
            row |= _paired(own, tested[reference], resamples, seed)
        rows.append(row)
    table = pd.DataFrame(rows)
    for metric in ("auroc", "accuracy"):
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
    if not np.array_equal(first.labels, second.labels):  # labels were shuffled: a control, and no rival
        return {}
    return {
        "auroc_difference": metric_of(first, "auroc") - metric_of(second, "auroc"),
        "auroc_p": auroc_p_value(first, second, resamples, seed),
        "accuracy_difference": metric_of(first, "accuracy") - metric_of(second, "accuracy"),
        "accuracy_p": accuracy_p_value(first, second, resamples, seed),
    }


def read_outcomes(results: str | Path) -> dict[str, Outcomes]:
    """Test results of every strategy in a results folder, from its finished trials.

    Raises:
        InputError: no trial is finished.
    """
    tables: dict[str, list[pd.DataFrame]] = {}
    for folder, record in finished_trials(results):
        threshold = json.loads((folder / "scores.json").read_text())["threshold_logit"]
        table = pd.read_csv(folder / "subjects.tsv", sep="\t", dtype={"participant_id": str})
        table = table.assign(margin=table["logit"] - threshold, fold=record["fold"], seed=record["seed"])
        tables.setdefault(record["strategy"], []).append(table)
    if not tables:
        raise InputError(f"{results}: no trial is finished; run `python -m scripts sweep` first")
    return {name: outcomes(pd.concat(parts)) for name, parts in tables.items()}


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
