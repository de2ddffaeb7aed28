"""What may be reported of what inference or the BIDS App has predicted.

A score that must not be trusted never leaves as a number: who is flagged, refused or could not be scored has no value
here, but a sentence that says why.
"""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bundle.deploy.inference import LIMITS, REFUSED
from bundle.errors import InputError
from bundle.files import metadata
from bundle.tasks.kinds import task_from

NOT_APPLICABLE, ERROR = "not-applicable", "error"
"""Why there is no value, in the words of FHIR (http://terminology.hl7.org/CodeSystem/data-absent-reason)."""


@dataclass(frozen=True)
class Result:
    """What is reported of one participant.

    Attributes:
        participant: as in the table.
        column: what is predicted.
        labels: what each measure is, in a few words, by the table's column.
        probability: whether the measures are probabilities, 0 to 1; else they are in the target's units.
        values: by column; empty where there is no value.
        absent: `NOT_APPLICABLE` or `ERROR` where there is no value, else "".
        remarks: sentences that go with it; first why there is no value.
        intended_use: of the model, one or two sentences.
        software: name and version of this bundle.
        sha256: of the model: of each of its networks.
        runs: ids of the runs that were used, or of all where none could be.
        pictures: WebP bytes by run id, as far as there are any.
    """

    participant: str
    column: str
    labels: Mapping[str, str]
    probability: bool
    values: Mapping[str, float]
    absent: str
    remarks: tuple[str, ...]
    intended_use: str
    software: tuple[str, str]
    sha256: tuple[str, ...]
    runs: tuple[str, ...]
    pictures: Mapping[str, bytes]

    def content(self) -> str:
        """All of it but the pictures, as text of which UIDs are made."""
        return json.dumps({name: value for name, value in vars(self).items() if name != "pictures"}, sort_keys=True)


def read_results(folder: Path) -> list[Result]:
    """What inference or the BIDS App has written.

    Raises:
        InputError: there is nothing, or it was written by another version.
    """
    table = folder / "predictions.tsv"
    if table.is_file():
        summary = folder / "store" / "summary.tsv"
        runs = _table(summary) if summary.is_file() else []
        pictures = {path.parent.name: path for path in folder.glob("store/runs/*/picture.webp")}
        shown = {run_id: path.read_bytes() for run_id, path in pictures.items()}
        return [_result(row, _facts(table), runs, shown) for row in _table(table)]
    found = []
    for table in sorted(folder.glob("phenotype/*_prediction.tsv")):
        facts = _facts(table)
        for row in _table(table):
            found.append(_result(row, facts, facts["runs"], _pictures(folder / f"{row['participant_id']}.html")))
    if not found:
        raise InputError(f"{folder} holds no predictions.tsv and no phenotype/*_prediction.tsv; predict first")
    return found


def _table(path: Path) -> list[dict[str, str]]:
    rows = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _facts(table: Path) -> dict[str, Any]:
    path = table.with_suffix(".json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        known = {"model", "warnings", "versions", "intended_use"} <= set(facts)
        if not (known and {"task", "members"} <= set(facts["model"])):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path} does not say what {table.name} was made with; predict again") from None
    return facts


def _pictures(page: Path) -> dict[str, bytes]:
    """The pictures of a participant's page by run id."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = re.findall(r'src="data:image/webp;base64,([^"]+)" alt="([^":]+):', text)
    return {run_id: base64.b64decode(picture) for picture, run_id in found}


def _result(
    row: Mapping[str, str],
    facts: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, bytes],
) -> Result:
    """What may be said of a row.

    Args:
        row: of the table.
        facts: beside it.
        runs: of the engine's summary, also other participants'.
        pictures: by run id.
    """
    name, model = row["participant_id"], facts["model"]
    own = [run for run in runs if run["participant_id"] == name]
    used = tuple(run["run_id"] for run in own if run["status"] not in REFUSED)
    task = task_from(model["task"])
    labels = {
        column: f"{column.split('_')[0]} {said.split(',')[0]}"
        for column, said in task.describe().items()
        if column in task.limited
    }
    for end, limit in LIMITS.items():
        labels |= {f"{column}_{end}": f"{labels[column]}, {limit} of the networks" for column in task.limited}
    labels = {column: label for column, label in labels.items() if column in row or column in task.limited}
    absent, why = _absent(row, labels)
    remarks = [why] if absent else []
    if known := row.get("known", "n/a").replace("n/a", ""):
        remarks.append(f"A run of this participant is in the {known} set of the model, so the score is no test.")
    if lost := len(own) - len(used):
        remarks.append(f"{lost} of {len(own)} runs could not be used.")
    remarks += sorted({f"{said[:1].upper()}{said[1:]}." for run, said in facts["warnings"].items() if run in used})
    bundle = metadata()
    return Result(
        participant=name,
        column=task.column,
        labels=labels,
        probability=task.kind != "regression",
        values={} if absent else {column: float(row[column]) for column in labels},
        absent=absent,
        remarks=tuple(remarks),
        intended_use=facts["intended_use"],
        software=(bundle["name"], facts["versions"].get(bundle["name"], bundle["version"])),
        sha256=tuple(one["sha256"] for one in model["members"]),
        runs=used or tuple(run["run_id"] for run in own),
        pictures={run_id: pictures[run_id] for run_id in used if run_id in pictures},
    )


def _absent(row: Mapping[str, str], labels: Mapping[str, str]) -> tuple[str, str]:
    """Why a participant has no value: the code, and a sentence; two empty ones for a value that may be reported."""
    if row.get("flag") in ("unlike", "refused"):
        unlike = f"No value: the scan is unlike those of the training subjects (percentile {float(row['unlike']):.4g})"
        return NOT_APPLICABLE, f"{unlike}, in: {row['reasons']}."
    if row.get("flag") != "like":
        return ERROR, "No value: the scan could not be scored."
    for column in labels:
        try:
            finite = math.isfinite(float(row[column]))
        except (KeyError, ValueError):
            finite = False
        if not finite:
            return ERROR, f"No value: the {column} is missing or not a number."
    return "", ""
