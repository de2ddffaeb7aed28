"""What is predicted: a column of the participants' table, read as classes or as a number."""

import difflib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bundle.errors import InputError
from bundle.preparation.store import read_index

logger = logging.getLogger(__name__)

KINDS = ("binary", "multiclass", "regression")
MOST_CLASSES = 20
"""Whole numbers of more values than this are amounts; of fewer, nobody can tell, and `task` has to."""
FEWEST_EACH = 4
"""Participants per class, on average, below which a column is taken for an amount or an identifier."""
DIAGNOSES = {
    "0": "control",
    "control": "control",
    "tdc": "control",
    "typically developing": "control",
    "1": "adhd",
    "adhd": "adhd",
    "adhd-combined": "adhd",
    "adhd-inattentive": "adhd",
    "adhd-hyperactive/impulsive": "adhd",
}
"""Words of the column `diagnosis` in ADHD-200 and in cohorts like it; a column of other words is taken as it is."""


@dataclass(frozen=True)
class Target:
    """A column as a target.

    Attributes:
        column: its name.
        kind: one of `KINDS`.
        classes: names of the classes, in the order of their numbers; of two, the second is what is looked for. Empty
            for a regression.
        labels: of each participant who has one: the number of the class, or the value.
        missing: participants without.
    """

    column: str
    kind: str
    classes: tuple[str, ...]
    labels: Mapping[str, float]
    missing: tuple[str, ...]

    def name_of(self, participant: str) -> str:
        """A participant's class or value as text, "n/a" without one."""
        if participant not in self.labels:
            return "n/a"
        label = self.labels[participant]
        return self.classes[int(label)] if self.classes else f"{label:g}"


def read_target(
    store: str | Path, target: str = "diagnosis", task: str | None = None, classes: Sequence[Any] | None = None
) -> Target:
    """The target of a store's participants, see `target_of`; what was read is logged."""
    found = target_of(read_index(store)["runs"], target, task, classes, store)
    what = ", ".join(f"{list(found.labels.values()).count(number)} {name}" for number, name in enumerate(found.classes))
    logger.info("Target %s, %s: %s", target, found.kind, what or f"{len(found.labels)} participants with a value")
    if found.missing:
        logger.warning(
            "%d of %d participants have no %s, and are left out of training and testing (pretraining sees them)",
            len(found.missing), len(found.missing) + len(found.labels), target,
        )  # fmt: skip
    return found


def target_of(
    runs: Iterable[Mapping[str, Any]],
    target: str = "diagnosis",
    task: str | None = None,
    classes: Sequence[Any] | None = None,
    source: str | Path = "the runs",
) -> Target:
    """Read a column of the participants' table as classes or as a number.

    Numbers that are not whole, or of more than 20 different values, make a regression, two different values two
    classes, and three words or more several; a few whole numbers could be either, and `task` must say which. Classes
    are in alphabetical or numerical order, unless `classes` give another; whoever has a value that these do not name is
    left out. The words of `DIAGNOSES` in a column `diagnosis` are two classes, control and adhd.

    Args:
        runs: records, as in a store's manifest.
        target: name of the column, `site` among them; capitals do not matter where there is one such.
        task: one of `KINDS`; None: what the values say.
        classes: the classes' values in their order; None: all.
        source: for messages.

    Raises:
        InputError: no such column, values that cannot be such a target, or two values of one participant.
    """
    if task is not None and task not in KINDS:
        raise InputError(f"task must be one of {', '.join(KINDS)}, not {task!r}")
    values = _values(runs, target, source)
    texts = {name: _text(value) for name, value in values.items() if not _is_missing(value)}
    where = f"{source}: the column {target!r}"
    if not texts:
        raise InputError(f"{where} has no value; fill in the participants' table and prepare again")
    if (
        target.lower() == "diagnosis"
        and task in (None, "binary")
        and {t.lower() for t in texts.values()} <= set(DIAGNOSES)
    ):
        texts = {name: DIAGNOSES[text.lower()] for name, text in texts.items()}
        classes = ("control", "adhd") if classes is None else classes
    kind = task or _kind_of(list(texts.values()), classes, where)
    if kind == "regression":
        if classes is not None:
            raise InputError(f"{where} is a regression's target, which has no classes; leave out classes, or give task")
        labels = _numbers(texts, where)
        named: tuple[str, ...] = ()
    else:
        named = _classes(texts, kind, classes, where)
        labels = {name: float(named.index(text)) for name, text in texts.items() if text in named}
    if len(set(labels.values())) < 2:
        only = next(iter(texts.values()))
        raise InputError(f"{where} is {only} for everybody who has a value, so there is nothing to predict")
    return Target(target, kind, named, labels, tuple(sorted(set(values) - set(labels))))


def _values(runs: Iterable[Mapping[str, Any]], column: str, source: str | Path) -> dict[str, Any]:
    """The column's value of each participant."""
    rows = [
        (run, {"site": run["site"], "diagnosis": run["diagnosis"]} | dict(run.get("participant", {}))) for run in runs
    ]
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    alike = [name for name in names if name == column] or [name for name in names if name.lower() == column.lower()]
    if len(alike) != 1:
        near = difflib.get_close_matches(column, names, n=3) or names
        raise InputError(f"{source}: the participants have no column {column!r}; there are {', '.join(near)}")
    values: dict[str, Any] = {}
    for run, row in rows:
        value = row.get(alike[0])
        known = values.setdefault(run["participant_id"], value)
        if known != value and not (_is_missing(known) and _is_missing(value)):
            raise InputError(
                f"{source}: participant {run['participant_id']} has two values of {column!r}, {known!r} and {value!r}; "
                "correct the table and prepare again"
            )
    return values


def _is_missing(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or str(value).strip().lower() in ("", "n/a", "nan")


def _text(value: Any) -> str:
    """A value as text; 1.0, which is how pandas writes whole numbers beside gaps, is 1."""
    number = None if isinstance(value, bool) else _number(value)
    return str(int(number)) if number is not None and number.is_integer() else str(value).strip()


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _kind_of(texts: Sequence[str], classes: Sequence[Any] | None, where: str) -> str:
    """The kind of task that values speak of."""
    if classes is not None:
        return "binary" if len(classes) == 2 else "multiclass"
    different = sorted(set(texts))
    numbers = [number for text in different if (number := _number(text)) is not None]
    words = len(numbers) < len(different)
    if not words and (len(different) > MOST_CLASSES or not all(number.is_integer() for number in numbers)):
        return "regression"
    if len(different) == 2:
        return "binary"
    if words:
        return "multiclass"
    raise InputError(
        f"{where} holds {len(different)} whole numbers, which may be classes or amounts; say which, with --task "
        "multiclass or --task regression"
    )


def _classes(texts: Mapping[str, str], kind: str, given: Sequence[Any] | None, where: str) -> tuple[str, ...]:
    """Names of the classes in their order."""
    counts = Counter(texts.values())
    named = tuple(map(_text, given)) if given is not None else tuple(sorted(counts, key=_order))
    if absent := [name for name in named if name not in counts]:
        raise InputError(f"{where} has no value {absent[0]!r}; there are {', '.join(sorted(counts, key=_order)[:20])}")
    if len(set(named)) < len(named):
        raise InputError(f"{where} cannot have one class twice, as in {', '.join(named)}")
    if kind == "binary" and len(named) > 2:
        raise InputError(
            f"{where} has {len(named)} values, such as {', '.join(named[:3])}; name two of them with --classes, or "
            "give --task multiclass"
        )
    if kind == "multiclass" and 1 < len(named) < 3:
        raise InputError(f"{where} has two values, {' and '.join(named)}; that is --task binary")
    total = sum(counts[name] for name in named)
    if given is None and total < FEWEST_EACH * len(named) and len(named) > 2:
        raise InputError(
            f"{where} has {len(named)} classes for {total} participants; is it an amount (--task regression)? "
            "Else choose the larger ones with --classes"
        )
    return named


def _order(text: str) -> tuple[float, str]:
    """Numbers by size, then words by the alphabet."""
    number = _number(text)
    return (math.inf, text) if number is None else (number, text)


def _numbers(texts: Mapping[str, str], where: str) -> dict[str, float]:
    numbers = {name: _number(text) for name, text in texts.items()}
    if words := [texts[name] for name, number in numbers.items() if number is None or not math.isfinite(number)]:
        raise InputError(f"{where} holds {words[0]!r}, which is no finite number; give --task binary or multiclass")
    return {name: number for name, number in numbers.items() if number is not None}


def strata_of(
    runs: Iterable[Mapping[str, Any]],
    target: str = "diagnosis",
    task: str | None = None,
    classes: Sequence[Any] | None = None,
    fewest: int = 1,
) -> dict[str, tuple[str, str]]:
    """Site and class of each participant, to split by: of a regression, site and which part of its site's values.

    Values are cut into four parts of equal size within each site, or into three, two or one where no part of any site
    would have `fewest` participants.

    Args:
        runs: records, as in a store's manifest.
        target: as for `target_of`, like `task` and `classes`. Where nobody has a diagnosis, "diagnosis" means sites.
        task: see there.
        classes: see there.
        fewest: participants of the largest stratum, at least.

    Returns:
        Participant to (site, class); the class is "n/a" without a value.

    Raises:
        InputError: as `target_of`, or a participant has two sites.
    """
    rows = list(runs)
    sites: dict[str, str] = {}
    for run in rows:
        known = sites.setdefault(run["participant_id"], str(run["site"]))
        if known != str(run["site"]):
            raise InputError(
                f"participant {run['participant_id']} has two sites, {known} and {run['site']}; correct the table and "
                "prepare again"
            )
    if target == "diagnosis" and all(_is_missing(value) for value in _values(rows, target, "the runs").values()):
        return {participant: (site, "n/a") for participant, site in sites.items()}
    found = target_of(rows, target, task, classes)
    if found.classes:
        return {participant: (site, found.name_of(participant)) for participant, site in sites.items()}
    for parts in (4, 3, 2, 1):
        strata = {participant: (site, "n/a") for participant, site in sites.items()}
        for site in set(sites.values()):
            members = sorted(
                (p for p, own in sites.items() if own == site and p in found.labels),
                key=lambda p: (found.labels[p], p),
            )
            for part, chosen in enumerate(np.array_split(np.array(members, object), parts), start=1):
                strata |= {str(p): (site, f"part {part} of {parts}") for p in chosen}
        if max(Counter(strata.values()).values()) >= fewest:
            return strata
    return strata
