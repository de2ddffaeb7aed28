"""AUROC over several cohorts and folds, and differences of it, with intervals over subjects."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bundle.evaluation.intervals import bootstrap_interval
from bundle.tasks.task import auroc_of_drawn, pairs_above

PAINTED = "painted"
WHAT = ["cohort", "encoder", "readout", "size", "shuffled", "shifted"]
"""Columns that say what was tested: `size` is the number of training subjects, 0 for all of a fold's."""


def summarise(rows: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """AUROC of everything that was tested, over all seeds, with 95 % intervals over subjects.

    Pairs of a case and a control count where they are of one cohort and fold, since logits of different folds are not
    on one scale. The subjects of a synthetic cohort are others with every seed; those of the painted one are the same.

    Args:
        rows: `WHAT`, `seed`, `fold`, `participant_id`, `label` and `logit` of each tested subject.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        `WHAT`, `seeds`, `auroc`, `low`, `high`, and `above`, the number of seeds whose own interval lies above 0.5,
        and `holds`, the number of those whose interval holds 0.5.
    """
    found = []
    for what, part in rows.groupby(WHAT, sort=False):
        single = [_auroc([_pairs(own)], resamples, seed) for _, own in part.groupby("seed")]
        own = {
            "seeds": len(single),
            "above": sum(score["low"] > 0.5 for score in single),
            "holds": sum(score["low"] <= 0.5 <= score["high"] for score in single),
        }
        found.append(dict(zip(WHAT, what, strict=True)) | own | _auroc([_pairs(part)], resamples, seed))
    return pd.DataFrame(found).rename(columns={"value": "auroc"})


def without_controls(table: pd.DataFrame) -> pd.DataFrame:
    """What of a table with the columns `WHAT` is of all training subjects, true labels and unmoved regions."""
    return table[(table["size"] == 0) & ~table["shuffled"] & ~table["shifted"]]


def differences(
    rows: pd.DataFrame,
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC of one thing minus another's on the same subjects and folds, with 95 % intervals over subjects.

    Args:
        rows: `WHAT`, `seed`, `fold`, `participant_id`, `label` and `logit` of each tested subject.
        pairs: two selections each, values of the columns `WHAT`; `size` is 0 and the controls False where not named.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        `cohort`, `first`, `second`, `difference`, `low`, `high`.
    """
    found = []
    for pair in pairs:
        chosen = [{"size": 0, "shuffled": False, "shifted": False} | dict(pick) for pick in pair]
        tables = [_pairs(rows[(rows[list(pick)] == pd.Series(pick)).all(axis=1)]) for pick in chosen]
        first, second = (f"{pick['encoder']}: {pick['readout']}" for pick in pair)
        row = {"cohort": pair[0]["cohort"], "first": first, "second": second}
        found.append(row | _auroc(tables, resamples, seed))
    return pd.DataFrame(found).rename(columns={"value": "difference"})


def _pairs(rows: pd.DataFrame) -> tuple[NDArray, NDArray]:
    """How often each case scores above each control, and how often the two were compared: (cases, controls) each."""
    same = (rows["cohort"] == PAINTED) & ~rows["shuffled"]  # the same subjects and labels with every seed
    names = rows["participant_id"].where(same, rows["seed"].astype(str) + " " + rows["participant_id"])
    place: dict[str, int] = {}
    for label in (1, 0):
        place |= {name: i for i, name in enumerate(sorted(set(names[rows["label"] == label])))}
    shape = tuple(len(set(names[rows["label"] == label])) for label in (1, 0))
    above, weights = np.zeros(shape), np.zeros(shape)
    for _, part in rows.assign(place=names.map(place)).groupby(["seed", "fold"]):
        cases, controls = part[part["label"] == 1], part[part["label"] == 0]
        where = np.ix_(cases["place"], controls["place"])
        above[where] += pairs_above(cases["logit"].to_numpy(), controls["logit"].to_numpy())
        weights[where] += 1
    return np.divide(above, weights, out=np.zeros(shape), where=weights > 0), weights


def _auroc(tables: Sequence[tuple[NDArray, NDArray]], resamples: int, seed: int) -> dict[str, float]:
    """The AUROC of `_pairs`, or the difference of two, cases and controls resampled apart."""
    n, m = tables[0][0].shape

    def statistic(first: NDArray, second: NDArray, axis: int) -> NDArray:
        a = np.apply_along_axis(np.bincount, axis, first, minlength=n).astype(float)  # how often each case was drawn
        b = np.apply_along_axis(np.bincount, axis, second, minlength=m).astype(float)
        scores = [auroc_of_drawn(a, b, above, weights) for above, weights in tables]
        return scores[0] - scores[1] if len(scores) == 2 else scores[0]

    low, high = bootstrap_interval((np.arange(n), np.arange(m)), statistic, resamples, seed)
    value = statistic(np.arange(n), np.arange(m), -1)
    return {"value": float(value), "low": float(low), "high": float(high)}
