"""Subject splits: one file says which participants train, validate and test, in pretraining and classification.

Subjects are split, never clips or runs, so that no test subject is seen in pretraining either.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from bundle.data.targets import strata_of
from bundle.errors import InputError
from bundle.files import write_json
from bundle.preparation.store import check_run_id

logger = logging.getLogger(__name__)

SETS = ("train", "validation", "test")


def make_splits(
    runs: Iterable[dict],
    folds: int = 10,
    fold: int = 0,
    seed: int = 0,
    test_site: str | None = None,
    target: str = "diagnosis",
    task: str | None = None,
    classes: Sequence[Any] | None = None,
) -> dict:
    """Split participants, stratified by site and by class, or by parts of a number's range.

    The participants are dealt into `folds` equal folds by scikit-learn's `StratifiedKFold`; fold number
    `fold` tests, the next one validates and the others train: 10 folds give 8:1:1. Calling this with every
    `fold` gives cross-validation in which each participant is tested once.

    Args:
        runs: records, as in a store's manifest; several of one participant must agree.
        folds: number of folds, 3 or more.
        fold: which fold tests, 0 to `folds` - 1; ignored when `test_site` is given.
        seed: seed of the shuffle.
        test_site: leave this whole site out for testing; one fold of the others validates.
        target: column to stratify by, see `bundle.data.targets.strata_of`; participants without a value are dealt out
            too.
        task: see there, like `classes`.
        classes: see there.

    Returns:
        `{"seed", "folds", "fold", "test_site", "target", "sets": {"train", "validation", "test"}, "sha256"}`; the sets
        are sorted lists of participant identifiers.

    Raises:
        InputError: too few participants, or rows of one participant that disagree.
    """
    strata = strata_of(runs, target, task, classes, fewest=folds)
    if folds < 3:
        raise InputError(f"folds must be 3 or more (train, validation and test), not {folds}")
    if not 0 <= fold < folds:
        raise InputError(f"fold must be 0 to {folds - 1}, not {fold}")
    sites = {participant: site for participant, (site, _) in strata.items()}
    if test_site is not None and test_site not in sites.values():
        raise InputError(f"test_site {test_site!r} is not in the data; sites are {sorted(set(sites.values()))}")

    held_out = {p for p, site in sites.items() if site == test_site} if test_site is not None else set()
    rest = sorted(set(strata) - held_out)
    if len(rest) < folds:
        raise InputError(f"{len(rest)} participants cannot be dealt into {folds} folds; give a smaller --folds")
    fold_of = _deal(rest, [f"{strata[p][0]}|{strata[p][1]}" for p in rest], folds, seed)
    names = {fold: "validation"} if test_site is not None else {fold: "test", (fold + 1) % folds: "validation"}
    sets: dict[str, list[str]] = {name: [] for name in SETS}
    for participant in rest:
        sets[names.get(fold_of[participant], "train")].append(participant)
    sets["test"] = sorted(sets["test"] + list(held_out))
    return {"seed": seed, "folds": folds, "fold": fold, "test_site": test_site, "target": target} | splits_of(sets)


def splits_of(sets: dict[str, list[str]]) -> dict:
    """The content of a split file for given sets of participants: `{"sets", "sha256"}`."""
    return {"sets": sets, "sha256": _hash(sets)}


def make_all_splits(
    runs: Iterable[dict], folds: int = 10, seed: int = 0, by_site: bool = False, **target: Any
) -> dict[str, dict]:
    """Make every split of a cross-validation, in which each participant is tested once.

    Args:
        runs: as for `make_splits`.
        folds: number of folds.
        seed: seed of the shuffle, the same for all.
        by_site: leave each site out in turn, instead of each fold.
        **target: `target`, `task` and `classes`, as for `make_splits`.

    Returns:
        Splits (see `make_splits`) by name, `fold-0` ... or `site-<name>` ....

    Raises:
        InputError: as `make_splits`, or only one site to leave out, or a site that cannot be a file's name.
    """
    rows = list(runs)
    if not by_site:
        return {f"fold-{fold}": make_splits(rows, folds, fold, seed, **target) for fold in range(folds)}
    sites = sorted({str(run["site"]) for run in rows})
    if len(sites) < 2:
        raise InputError(f"there is only the site {sites[0]}, so none can be left out; use folds")
    for site in sites:
        check_run_id(site)
    return {f"site-{site}": make_splits(rows, folds, 0, seed, test_site=site, **target) for site in sites}


def save_all_splits(
    runs: Iterable[dict], folder: str | Path, folds: int = 10, seed: int = 0, by_site: bool = False, **target: Any
) -> list[dict]:
    """Write every split of a cross-validation as FOLDER/<name>.json, and return their counts, a `file` per row."""
    rows = list(runs)
    made = make_all_splits(rows, folds, seed, by_site, **target)
    for name, splits in made.items():
        save_splits(splits, Path(folder) / f"{name}.json")
    return [
        {"file": f"{name}.json"} | row for name, splits in made.items() for row in count_table(splits, rows, **target)
    ]


def _deal(participants: Sequence[str], strata: Sequence[str], folds: int, seed: int) -> dict[str, int]:
    _, counts = np.unique(strata, return_counts=True)
    if counts.max() < folds:
        # StratifiedKFold needs one stratum at least as large as the number of folds.
        advice = "give a smaller --folds" if folds > 3 else "add participants (3 folds are the fewest)"
        raise InputError(
            f"the largest site and class has {counts.max()} participants, fewer than {folds} folds; {advice}"
        )
    if counts.min() < folds:
        logger.warning(
            "%d groups of one site and class have fewer than %d participants: some folds will not hold them",
            int((counts < folds).sum()),
            folds,
        )
    splitter = StratifiedKFold(n_splits=folds, shuffle=True, random_state=seed)
    fold_of = {}
    for number, (_, members) in enumerate(splitter.split(np.zeros(len(strata)), strata)):
        fold_of.update({participants[i]: number for i in members})
    return fold_of


def _hash(sets: dict[str, list[str]]) -> str:
    canonical = json.dumps({name: sorted(sets[name]) for name in SETS})
    return hashlib.sha256(canonical.encode()).hexdigest()


def save_splits(splits: dict, path: str | Path) -> None:
    """Write a split file atomically (write, then rename)."""
    write_json(Path(path), splits)


def load_splits(path: str | Path) -> dict:
    """Read a split file and check it: its hash fits, the sets are disjoint and none is empty.

    Raises:
        InputError: the file is absent, is not a split file, was edited, or its sets overlap.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no split file here; make one with `python -m scripts splits STORE`")
    try:
        splits = json.loads(path.read_text())
        sets = {name: list(splits["sets"][name]) for name in SETS}
        recorded = splits["sha256"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a split file ({error!r}); make one with `python -m scripts splits STORE`"
        ) from error
    for i, first in enumerate(SETS):
        for second in SETS[i + 1 :]:
            both = sorted(set(sets[first]) & set(sets[second]))
            if both:
                raise InputError(f"{path}: {both[0]} is in both {first} and {second}; make the split file anew")
    if _hash(sets) != recorded:
        raise InputError(f"{path}: the sets do not fit the recorded sha256 (edited by hand?); make the file anew")
    empty = [name for name in SETS if not sets[name]]
    if empty:
        raise InputError(f"{path}: the {empty[0]} set is empty; make the file anew with other --folds")
    return splits


def check_participants(splits: dict, participants: Iterable[str], path: str | Path) -> None:
    """Refuse a split file that does not name exactly the participants of a store.

    Raises:
        InputError: a participant of the store is in no set, or a set names one that the store lacks.
    """
    named = {participant for name in SETS for participant in splits["sets"][name]}
    stored = set(participants)
    for odd, problem in (
        (stored - named, "of the store is in no set"),
        (named - stored, "is not in the store"),
    ):
        if odd:
            raise InputError(
                f"{path}: participant {min(odd)} {problem} ({len(odd)} such); split file and store disagree, "
                "make the file anew with `python -m scripts splits STORE`"
            )


def count_table(splits: dict, runs: Iterable[dict], **target: Any) -> list[dict]:
    """Count participants per set, site and class: rows of `set, site, <target>, participants`.

    Args:
        splits: from `make_splits`.
        runs: what it was given.
        **target: `target`, `task` and `classes`, as for `make_splits`.
    """
    column = target.get("target", "diagnosis")
    strata = strata_of(runs, fewest=splits.get("folds", 1), **target)
    rows: dict[tuple[str, str, str], int] = {}
    for name in SETS:
        for participant in splits["sets"][name]:
            key = (name, *strata[participant])
            rows[key] = rows.get(key, 0) + 1
    order = {name: i for i, name in enumerate(SETS)}
    return [
        {"set": name, "site": site, column: group, "participants": count}
        for (name, site, group), count in sorted(rows.items(), key=lambda row: (order[row[0][0]], row[0]))
    ]
