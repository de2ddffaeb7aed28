"""What inference leaves behind, made up, and what is read back of reports made of it."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from bundle.deploy.reports import FORMATS
from bundle.dicom.convert import read_folder
from bundle.dicom.series import Series, sort_series
from bundle.files import write_json

INTENDED = "Research only. Not a medical device; not for diagnosis."
SHA = "0123456789abcdef" * 4
BINARY = {"kind": "binary", "column": "diagnosis", "classes": ["control", "adhd"], "mean": 0.0, "sd": 1.0}
AGE = {"kind": "regression", "column": "age", "classes": [], "mean": 30.0, "sd": 9.0}
SUBTYPES = BINARY | {"kind": "multiclass", "column": "subtype", "classes": ["control", "inattentive", "low"]}
LIKE = {"probability": "0.7312345678901234567", "unlike": "0.31", "flag": "like", "reasons": "", "known": ""}
UNLIKE = LIKE | {"unlike": "0.9993", "flag": "unlike", "reasons": "a TR of 3.2 s"}
REFUSED = UNLIKE | {"flag": "refused", "probability": ""}


def series_of(source: Path) -> list[Series]:
    return [series for series in sort_series(read_folder(source)[0]) if series.kind == "BOLD"]


def run_of(series: Series) -> str:
    return f"sub-{series.subject}_task-rest_acq-{series.name}"


def predicted(
    folder: Path,
    rows: dict[str, dict[str, str]],
    runs: dict[str, str],
    task: dict = BINARY,
    shas: tuple[str, ...] = (SHA,),
    warnings: dict[str, str] | None = None,
) -> Path:
    """What inference leaves behind: rows by participant; runs with their participants."""
    (folder / "store").mkdir(parents=True)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["participant_id", *columns], *([name, *(row[c] for c in columns)] for name, row in rows.items())]
    (folder / "predictions.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    lines = [["run_id", "participant_id", "status"], *([run, name, "prepared"] for run, name in runs.items())]
    (folder / "store" / "summary.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    model = {"task": task, "sha256": shas[0], "members": [{"sha256": sha} for sha in shas]}
    facts = {"model": model, "versions": {"brain_fmri_roi_mae": "1.2.3"}, "intended_use": INTENDED}
    write_json(folder / "predictions.json", facts | {"warnings": warnings or {}})
    return folder


def of_source(folder: Path, source: Path, row: dict[str, str] = LIKE, **more: object) -> Path:
    """Predictions of each series of a source, under the names that the conversion gives."""
    series = series_of(source)
    rows = {f"sub-{one.subject}": row for one in series}
    return predicted(folder, rows, {run_of(one): f"sub-{one.subject}" for one in series}, **more)


def written(out: Path) -> tuple[Dataset, Dataset, dict]:
    (sr,), (page,), (fhir,) = (list(out.glob(f"*_{ending}")) for ending in FORMATS.values())
    return pydicom.dcmread(sr), pydicom.dcmread(page), json.loads(fhir.read_text())


def items(data: Dataset) -> Iterator[Dataset]:
    """All content items of an SR."""
    for item in data.get("ContentSequence", ()):
        yield item
        yield from items(item)


def said(report: Dataset) -> dict[str, list]:
    """Values by the meaning of their names."""
    found: dict[str, list] = {}
    for item in items(report):
        if item.ValueType == "NUM":
            value = item.MeasuredValueSequence[0].FloatingPointValue
        elif item.ValueType == "CODE":
            value = item.ConceptCodeSequence[0].CodeMeaning
        else:
            value = item.get("TextValue")
        found.setdefault(item.ConceptNameCodeSequence[0].CodeMeaning, []).append(
            "".join(value) if isinstance(value, list) else value
        )
    return found


def entries(bundle: dict, kind: str) -> list[dict]:
    return [entry["resource"] for entry in bundle["entry"] if entry["resource"]["resourceType"] == kind]


def complaints(path: Path) -> list[str]:
    """What dciodvfy calls an error."""
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy is not installed (Debian: apt-get install dicom3tools)")
    done = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, errors="replace")
    assert re.search("^(ComprehensiveSR|EncapsulatedPDF)$", done.stderr, flags=re.M)
    return [line for line in done.stderr.splitlines() if line.startswith("Error")]
