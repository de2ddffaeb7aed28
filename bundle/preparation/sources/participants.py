"""Participants' tables, labels, and what lies beside a run: shared by every layout."""

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from bundle.errors import InputError
from bundle.preparation.bids_names import entities, stem

logger = logging.getLogger(__name__)

Run = dict[str, Any]
Labels = Literal["required", "optional"]

TEXT_COLUMNS = ("participant_id", "run_id", "bold", "mask", "confounds", "space", "site", "diagnosis")
_OUTPUT_ENTITIES = ("space", "cohort", "res", "den", "desc")  # say how a run was processed, not which run it is


def run_id_of(path: Path) -> str:
    """A BIDS file's run id: its entities without those of the output (space, res, desc), as `sub-01_task-rest`."""
    kept = {key: value for key, value in entities(path).items() if key not in _OUTPUT_ENTITIES}
    return "_".join(f"{key}-{value}" for key, value in kept.items())


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted; linked folders are followed, loops of them and hidden ones (.git) are not.

    What cannot be read is left out with a warning.
    """
    found: list[Path] = []
    todo = [(folder, frozenset([os.path.realpath(folder)]))]  # each with the real folders that lead to it
    while todo:
        place, above = todo.pop()
        try:
            names = sorted(os.listdir(place))  # noqa: PTH208
        except OSError as error:
            logger.warning("%s cannot be read (%s), so what it holds is left out", place, error.strerror)
            continue
        for name in names:
            path = place / name
            if name.startswith("."):
                continue
            if not os.path.isdir(path):  # noqa: PTH112  (Path.is_dir raises where a name is too long)
                found.append(path)
            elif (real := os.path.realpath(path)) not in above:
                todo.append((path, above | {real}))
    return sorted(found)


def beside(bold: Path) -> dict[str, Path | None]:
    """The brain mask and the confounds that fMRIPrep has written beside a run, None where there are none."""
    preprocessed = stem(bold).removesuffix("_desc-preproc_bold")
    if preprocessed == stem(bold):
        return {"mask": None, "confounds": None}
    masks = [bold.with_name(f"{preprocessed}_desc-brain_mask{ending}") for ending in (".nii.gz", ".nii")]
    confounds = bold.with_name(f"{run_id_of(bold)}_desc-confounds_timeseries.tsv")
    return {
        "mask": next((mask for mask in masks if mask.is_file()), None),
        "confounds": confounds if confounds.is_file() else None,
    }


def read_participants(path: Path, labels: Labels) -> dict[str, dict[str, Any]]:
    """Read participants.tsv (or .csv): rows by participant_id without "sub-".

    Raises:
        InputError: the table cannot be used, or gives a participant two rows.
    """
    rows = read_table(path, ["participant_id", *(["site"] if labels == "required" else [])])
    by_id: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(records(rows), start=2):
        if row["participant_id"] is None:
            raise InputError(f"{path} has no participant_id in line {number}; fill it in, or remove the line")
        key = row["participant_id"].removeprefix("sub-")
        if key in by_id:
            raise InputError(f"{path} has more than one row for {row['participant_id']}; keep one")
        by_id[key] = row
    return by_id


def find_participants(folder: Path, given: str | Path | None, labels: Labels) -> dict[str, dict[str, Any]]:
    """Rows of the given table, else of participants.tsv in a folder or up to two above; {} if labels are optional.

    Raises:
        InputError: labels are required and there is no table, or it cannot be used.
    """
    folders = [folder, *list(folder.resolve().parents)[:2]]
    found = [place / "participants.tsv" for place in folders if (place / "participants.tsv").is_file()]
    if given is None and not found:
        if labels == "optional":
            return {}
        raise InputError(f"there is no participants.tsv in {folder} or two folders up; give one, or labels=optional")
    return read_participants(Path(given) if given is not None else found[0], labels)


def read_table(path: Path, required: Sequence[str]) -> pd.DataFrame:
    """Read a .csv or .tsv table, with the columns `site` and `diagnosis` in any case.

    Raises:
        InputError: it cannot be read, lacks a required column, or is empty.
    """
    separators = {".csv": ",", ".tsv": "\t"}
    if path.suffix not in separators:
        raise InputError(f"{path} must be a .csv or .tsv table")
    try:
        rows = pd.read_csv(path, sep=separators[path.suffix], dtype=dict.fromkeys(TEXT_COLUMNS, str))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); check the path and the columns") from error
    missing = [column for column in required if column not in rows]
    if missing:
        raise InputError(f"{path} has no column {' or '.join(missing)}; its columns are {', '.join(rows)}")
    if rows.empty:
        raise InputError(f"{path} has no rows; add the participants")
    if not isinstance(rows.index, pd.RangeIndex):  # pandas then takes the first column for an index
        raise InputError(f"{path} has rows with more fields than its header; remove the separator at their ends")
    for column in rows.columns.intersection(TEXT_COLUMNS):
        rows[column] = rows[column].str.strip()  # "sub-01 " and "sub-01", or "A " and "A", are one
    return rows.reindex(columns=list(dict.fromkeys([*rows.columns, "site", "diagnosis"])))


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries of plain Python values, None where a cell is empty or n/a."""
    return [
        {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in rows.astype(object).to_dict("records")
    ]


def with_participant(run: Run, row: dict[str, Any], labels: Labels, problem: str | None) -> Run:
    """Add a participant's columns; where labels are required, no row, or none with a site, is a problem."""
    known = {*TEXT_COLUMNS, "tr"}
    run |= {
        "site": row.get("site"),
        "diagnosis": row.get("diagnosis"),
        "participant": {  # JSON has no infinity
            key: str(value) if value in (math.inf, -math.inf) else value
            for key, value in row.items()
            if key not in known
        },
    }
    if labels == "required":
        if problem is None and run["site"] is None:
            problem = f"{run['participant_id']} has no site in the participants' table"
        if problem is not None:
            run["problem"] = f"{problem}; add it, or prepare with labels=optional (enough for pretraining)"
    return run


def refuse_duplicate_runs(runs: Sequence[Run], where: str | Path) -> list[Run]:
    """Runs sorted by run id.

    Raises:
        InputError: two files have the same run id, so they are two versions of one run.
    """
    for run_id, count in Counter(run["run_id"] for run in runs).items():
        if count > 1:
            names = " and ".join(run["bold"].name for run in runs if run["run_id"] == run_id)
            raise InputError(f"{where} holds {names}, which are one run; keep one, or list the runs in a table")
    return sorted(runs, key=lambda run: run["run_id"])
