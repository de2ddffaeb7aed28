"""The pages of the BIDS App: one per participant, and one of all. They show whichever columns the engine gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundle.files import write_text
from bundle.pages import render
from bundle.preparation.chain import load_preparation
from bundle.preparation.prepare import GOOD_OVERLAP
from bundle.preparation.run_report import cards, rugs

KINDS = {"scored": "good", "incomplete": "warned", "failed": "failed", "absent": "excluded"}
"""How a participant's status is coloured, in the words of `bundle.preparation.run_report`."""


_HEAD = ("participant_id", "status")


def _kind(row: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """How a participant is coloured; who is scored with a warning is not good."""
    kind = KINDS[row["status"]]
    return "warned" if kind == "good" and facts["warnings"] else kind


def _low() -> dict[str, float]:
    return {"coverage": load_preparation().min_coverage, "mni_overlap": GOOD_OVERLAP}


def write_participant_page(
    path: Path,
    row: Mapping[str, str],
    meanings: Mapping[str, str],
    facts: Mapping[str, Any],
    pictures: Mapping[str, bytes],
) -> None:
    """Write a participant's page.

    Args:
        path: the page.
        row: the row of the table: "participant_id", "status", and whatever the engine has given.
        meanings: of the columns.
        facts: "reason", "runs" (rows as from `bundle.preparation.prepare.row_of`), and of a scored participant what
            `bundle.deploy.inference.Predictions` writes beside the columns.
        pictures: of the prepared runs, WebP bytes by run id.
    """
    context = {
        "row": row,
        "kind": _kind(row, facts),
        "values": [(name, value, meanings.get(name, "")) for name, value in row.items() if name not in _HEAD],
        "facts": facts,
    }
    write_text(path, render("participant.html.j2", **context, **cards(facts["runs"], pictures, _low())))


def write_group_page(
    path: Path,
    rows: Sequence[Mapping[str, str]],
    meanings: Mapping[str, str],
    facts: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the page of all participants.

    Args:
        path: the page, beside which the participants' pages lie.
        rows: one per participant, with the same columns, "n/a" where there is no value.
        meanings: of the columns.
        facts: of each participant who has been tried, as for `write_participant_page`.
    """
    kinds = {row["participant_id"]: _kind(row, facts.get(row["participant_id"], {})) for row in rows}
    coloured = [_numbers(row) | {"status": kinds[row["participant_id"]], "warnings": ""} for row in rows]
    columns = {name: (name, "") for row in coloured for name, value in row.items() if isinstance(value, float)}
    context = {
        "rows": [{**row, "kind": kinds[row["participant_id"]], "page": row["participant_id"] in facts} for row in rows],
        "columns": [name for name in (rows[0] if rows else {}) if name not in _HEAD],
        "meanings": meanings,
        "kinds": {word: sum(row["status"] == word for row in rows) for word in KINDS},
        "colours": KINDS,
        "scores": rugs(coloured, {}, columns),
        "runs": rugs([run for said in facts.values() for run in said["runs"]], _low()),
        "reasons": {name: said["reason"] for name, said in facts.items() if said["reason"]},
        "warnings": {name: said["warnings"] for name, said in facts.items() if said["warnings"]},
        "facts": next(iter(facts.values())),
    }
    write_text(path, render("group.html.j2", **context))


def _numbers(row: Mapping[str, str]) -> dict[str, Any]:
    """The row with numbers as such."""
    found: dict[str, Any] = dict(row)
    for name, text in row.items():
        try:
            found[name] = float(text)
        except ValueError:
            if text == "n/a":
                found[name] = None
    return found
