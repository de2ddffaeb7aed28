"""Where runs come from: a BIDS derivatives folder (fMRIPrep's layout) or a table; both give the same list.

A run is a dictionary:

    run_id          unique, fit to be a folder's name
    participant_id  as in the participants' table
    bold, mask      paths; mask may be None
    tr, space       the user's word, or None to take the file's
    site, diagnosis site's name and 1 (case) or 0 (control); either may be None
    participant     the participant's other columns
    problem         only where the run must not be prepared: why
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from bundle.bold import entities, stem
from bundle.errors import InputError

Run = dict[str, Any]
Labels = Literal["required", "optional"]

CONTROL, CASE = 0, 1
DIAGNOSES = {
    "0": CONTROL,
    "control": CONTROL,
    "tdc": CONTROL,
    "typically developing": CONTROL,
    "1": CASE,
    "adhd": CASE,
    "adhd-combined": CASE,
    "adhd-inattentive": CASE,
    "adhd-hyperactive/impulsive": CASE,
}
_OUTPUT_ENTITIES = ("space", "cohort", "res", "den", "desc")  # say how a run was processed, not which run it is
_TEXT_COLUMNS = ("participant_id", "run_id", "bold", "mask", "space", "site", "diagnosis")


def find_runs(source: str | Path, labels: Labels = "required") -> list[Run]:
    """List the runs of a derivatives folder (`from_bids`) or of a .csv or .tsv table (`from_table`)."""
    return from_table(source, labels) if Path(source).is_file() else from_bids(source, labels=labels)


def from_bids(
    derivatives: str | Path, participants: str | Path | None = None, labels: Labels = "required"
) -> list[Run]:
    """List the MNI-space preprocessed BOLD runs of a derivatives folder.

    Takes `sub-*[/ses-*]/func/*_space-MNI*_desc-preproc_bold.nii[.gz]`, each with the `_desc-brain_mask` beside it
    if there is one.

    Args:
        derivatives: the folder that holds the sub-* folders.
        participants: participants.tsv; by default the one in `derivatives`, else in the nearest folder above, up to
            two levels (as for a dataset's derivatives/fmriprep).
        labels: "required" marks a run whose participant has no row or no diagnosis with a "problem"; "optional"
            keeps it, as pretraining needs no label.

    Returns:
        Runs sorted by run id (see the module).

    Raises:
        InputError: no folder, no runs, two files for one run, or a table that cannot be used.
    """
    derivatives = Path(derivatives)
    if not derivatives.is_dir():
        raise InputError(f"{derivatives} is not a folder; give the derivatives folder that holds the sub-* folders")
    pattern = "sub-*/**/func/*_bold.nii*"
    paths = [path for path in sorted(derivatives.glob(pattern)) if _is_preprocessed_mni(path)]
    if not paths:
        raise InputError(
            f"{derivatives} holds no sub-*/[ses-*/]func/*_space-MNI*_desc-preproc_bold.nii[.gz]; check the path, or "
            "that preprocessing wrote an MNI output space"
        )
    table = _bids_participants(derivatives, participants, labels)
    runs = [_bids_run(path, table, labels) for path in paths]
    for run_id, count in Counter(run["run_id"] for run in runs).items():
        if count > 1:
            names = " and ".join(run["bold"].name for run in runs if run["run_id"] == run_id)
            raise InputError(f"{derivatives} holds {names}, which are one run; keep one, or list the runs in a table")
    return sorted(runs, key=lambda run: run["run_id"])


def from_table(table: str | Path, labels: Labels = "required") -> list[Run]:
    """List the runs of a table with one row per run.

    Args:
        table: .csv or .tsv with the columns participant_id and bold, and optionally mask, tr (seconds), space, site,
            diagnosis and run_id; further columns go with the participant. Relative paths are relative to the table.
        labels: see `from_bids`.

    Returns:
        Runs in the table's order (see the module). Without a run_id column the run id is the BOLD file's name, after
            the participant where the name has no BIDS sub entity.

    Raises:
        InputError: the table cannot be read or lacks a column or a value; a diagnosis is unknown or differs
            between a participant's rows; two rows have the same run id.
    """
    table = Path(table)
    rows = _read_table(table, ["participant_id", "bold", *(("site", "diagnosis") if labels == "required" else ())])
    for participant_id, group in rows.groupby("participant_id"):
        if group["diagnosis"].nunique(dropna=False) > 1 or group["site"].nunique(dropna=False) > 1:
            raise InputError(f"{table} gives {participant_id} more than one site or diagnosis; correct its rows")
    runs = [_table_run(row, number, table, labels) for number, row in enumerate(_records(rows), start=2)]
    repeated = [run_id for run_id, count in Counter(run["run_id"] for run in runs).items() if count > 1]
    if repeated:
        raise InputError(f"{table} gives more than one row the run id {repeated[0]}; add a unique run_id column")
    return runs


def run_id_of(path: Path) -> str:
    """A BIDS file's run id: its entities without those of the output (space, res, desc), as `sub-01_task-rest`."""
    kept = {key: value for key, value in entities(path).items() if key not in _OUTPUT_ENTITIES}
    return "_".join(f"{key}-{value}" for key, value in kept.items())


def _is_preprocessed_mni(path: Path) -> bool:
    parts = entities(path)
    return (
        path.name.endswith((".nii", ".nii.gz"))
        and parts.get("space", "").startswith("MNI")
        and parts.get("desc") == "preproc"
    )


def _bids_participants(derivatives: Path, given: str | Path | None, labels: Labels) -> dict[str, dict[str, Any]]:
    """The participants' rows by id without "sub-"; empty only where there is no table and none is needed."""
    folders = [derivatives, *list(derivatives.resolve().parents)[:2]]
    found = [folder / "participants.tsv" for folder in folders if (folder / "participants.tsv").is_file()]
    if given is None and not found:
        if labels == "optional":
            return {}
        raise InputError(
            f"there is no participants.tsv in {derivatives} or two folders up; give one, or labels=optional"
        )
    path = Path(given) if given is not None else found[0]
    rows = _read_table(path, ["participant_id", *(("site", "diagnosis") if labels == "required" else ())])
    by_id: dict[str, dict[str, Any]] = {}
    for row in _records(rows):
        key = row["participant_id"].removeprefix("sub-")
        if key in by_id:
            raise InputError(f"{path} has more than one row for {row['participant_id']}; keep one")
        by_id[key] = row
    return by_id


def _bids_run(path: Path, participants: dict[str, dict[str, Any]], labels: Labels) -> Run:
    parts = entities(path)
    mask = path.with_name(re.sub(r"_desc-preproc_bold\.nii(\.gz)?$", r"_desc-brain_mask.nii\1", path.name))
    row = participants.get(parts["sub"])
    run = {
        "run_id": run_id_of(path),
        "participant_id": f"sub-{parts['sub']}",
        "bold": path,
        "mask": mask if mask.is_file() else None,
        "tr": None,
        "space": None,
    }
    problem = None if row is not None else f"sub-{parts['sub']} has no row in participants.tsv"
    return _with_participant(run, row or {}, labels, problem)


def _table_run(row: dict[str, Any], number: int, table: Path, labels: Labels) -> Run:
    for column in ("participant_id", "bold"):
        if row[column] is None:
            raise InputError(f"{table} has no {column} in line {number}; fill it in")
    bold = table.parent / row["bold"]
    run_id = row.get("run_id")
    if run_id is None:
        named = "sub" in entities(bold)
        run_id = run_id_of(bold) if named else f"{row['participant_id']}_{stem(bold)}"
    tr = row.get("tr")
    if tr is not None and not isinstance(tr, int | float):
        raise InputError(f"{table} has the TR {tr!r} in line {number}; give seconds")
    run = {
        "run_id": run_id,
        "participant_id": row["participant_id"],
        "bold": bold,
        "mask": table.parent / row["mask"] if row.get("mask") else None,
        "tr": tr,
        "space": row.get("space"),
    }
    return _with_participant(run, row, labels, None)


def _with_participant(run: Run, row: dict[str, Any], labels: Labels, problem: str | None) -> Run:
    known = {*_TEXT_COLUMNS, "tr"}
    run |= {
        "site": row.get("site"),
        "diagnosis": None if row.get("diagnosis") is None else int(row["diagnosis"]),
        "participant": {key: value for key, value in row.items() if key not in known},
    }
    if labels == "required":
        for column in ("diagnosis", "site"):
            if problem is None and run[column] is None:
                problem = f"{run['participant_id']} has no {column} in the participants' table"
        if problem is not None:
            run["problem"] = f"{problem}; add it, or prepare with labels=optional (enough for pretraining)"
    return run


def _read_table(path: Path, required: list[str]) -> pd.DataFrame:
    separators = {".csv": ",", ".tsv": "\t"}
    if path.suffix not in separators:
        raise InputError(f"{path} must be a .csv or .tsv table")
    try:
        rows = pd.read_csv(path, sep=separators[path.suffix], dtype=dict.fromkeys(_TEXT_COLUMNS, str))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); check the path and the columns") from error
    missing = [column for column in required if column not in rows]
    if missing:
        raise InputError(f"{path} has no column {' or '.join(missing)}; its columns are {', '.join(rows)}")
    if rows.empty:
        raise InputError(f"{path} has no rows; add the participants")
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, "site", "diagnosis"])))
    # 1.0 is how pandas writes whole numbers beside gaps
    texts = rows["diagnosis"].astype(str).str.strip().str.lower().str.removesuffix(".0").mask(rows["diagnosis"].isna())
    if unknown := sorted(set(texts.dropna()) - DIAGNOSES.keys()):
        raise InputError(f"{path} has the diagnosis {', '.join(unknown)}; use 0 or control, 1 or ADHD, or n/a")
    return rows.assign(diagnosis=texts.map(DIAGNOSES))


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries of plain Python values, None where a cell is empty or n/a."""
    return [
        {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in rows.astype(object).to_dict("records")
    ]
