"""A table with one row per run."""

from collections import Counter
from pathlib import Path
from typing import Any

from bundle.errors import InputError
from bundle.preparation.bids_names import entities, stem
from bundle.preparation.sources.participants import (
    Labels,
    Run,
    beside,
    read_table,
    records,
    run_id_of,
    with_participant,
)
from bundle.workers import uncollected


def from_table(table: str | Path, labels: Labels = "required") -> list[Run]:
    """List the runs of a table with one row per run.

    Args:
        table: .csv or .tsv with the columns participant_id and bold, and optionally mask, confounds, tr (seconds),
            space, site, diagnosis and run_id; further columns go with the participant. Relative paths are relative
            to the table; where it gives no mask or confounds, fMRIPrep's beside the run are used.
        labels: see `from_bids`.

    Returns:
        Runs in the table's order (see the package). Without a run_id column the run id is the BOLD file's name, after
            the participant where the name has no BIDS sub entity.

    Raises:
        InputError: the table cannot be read or lacks a column or a value; a site differs between a
            participant's rows; two rows have the same run id.
    """
    table = Path(table)
    rows = read_table(table, ["participant_id", "bold", *(["site"] if labels == "required" else [])])
    sites = rows.groupby("participant_id")["site"].nunique(dropna=False)
    if (sites > 1).any():
        raise InputError(f"{table} gives {sites.idxmax()} more than one site; correct its rows")
    with uncollected():
        runs = [_run(row, number, table, labels) for number, row in enumerate(records(rows), start=2)]
    repeated = [run_id for run_id, count in Counter(run["run_id"] for run in runs).items() if count > 1]
    if repeated:
        raise InputError(f"{table} gives more than one row the run id {repeated[0]}; add a unique run_id column")
    return runs


def _run(row: dict[str, Any], number: int, table: Path, labels: Labels) -> Run:
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
    given = {column: table.parent / row[column] for column in ("mask", "confounds") if row.get(column)}
    run = {
        "run_id": run_id,
        "participant_id": row["participant_id"],
        "bold": bold,
        **beside(bold),
        **given,
        "tr": tr,
        "space": row.get("space"),
    }
    return with_participant(run, row, labels, None)
