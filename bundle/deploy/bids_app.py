"""The BIDS App (Gorgolewski et al. 2017, PLoS Comput Biol 13:e1005209): derivatives in, derivatives out.

The engine is `configs/inference.json`. It is run for each participant by itself, so that nobody's bad scan stops the
others, and so that a call that was interrupted goes on at the next participant. What the engine writes is passed on as
it is, whatever its columns are:

    OUT/phenotype/<participant>_prediction.tsv, .json   the row and what it means, from the level "participant"
    OUT/<participant>.html                              the page, likewise
    OUT/phenotype/prediction.tsv, .json, OUT/group.html all participants, from the level "group"
    OUT/audit.jsonl                                     what was tried when, by hashes; see `bundle.deploy.audit`

BIDS has no place for a table of predictions of one participant but `phenotype/`, where measurements of participants lie
(BIDS 1.10, "Phenotypic and assessment data"). Pages and the audit log it does not know; `.bidsignore` names them, and
nothing else.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
from monai.bundle import ConfigParser

from bundle.anatomy.atlas import AAL3
from bundle.deploy.app_pages import write_group_page, write_participant_page
from bundle.deploy.audit import append_line
from bundle.deploy.inference import REFUSED
from bundle.deploy.release import ReleasedModel, release
from bundle.errors import InputError, unwrapped
from bundle.files import ROOT, WriteError, config_file, file_sha256, metadata, write_json, write_text
from bundle.preparation.pictures import stored_picture
from bundle.preparation.prepare import identify_runs
from bundle.preparation.sources.bids import files_by_participant, runs_of
from bundle.preparation.sources.participants import Run
from bundle.preparation.store import read_records
from bundle.workers import parallel_map

logger = logging.getLogger(__name__)

LEVELS = ("participant", "group")
SCORED, INCOMPLETE, FAILED, ABSENT = "scored", "incomplete", "failed", "absent"
STATUS = {
    SCORED: "all runs were used",
    INCOMPLETE: "scored, but a run could not be used; the page says why",
    FAILED: "not scored; the page says why",
    ABSENT: "not tried yet",
}
SOURCE = "preprocessed"
"""Name of the input in BIDS URIs, see `DatasetLinks` in dataset_description.json."""
AUDIT = "audit.jsonl"
_OWN = ("bundle_root", "dataset_dir", "output_dir", "checkpoint", "run", "initialize", "imports")
_README = """# Predictions of {name}

Made by `python -m scripts app` of {name} {version}. {intended_use}

- `phenotype/prediction.tsv`: a row per participant (level "group"); `.json` beside it says what the columns are.
- `phenotype/sub-*_prediction.tsv`, `.json`: one participant's row, and what it was made with and from.
- `sub-*.html`, `group.html`: pages to look at. Each is one file and loads nothing.
- `audit.jsonl`: a line per participant and attempt, with hashes and without names.
"""


@dataclass(frozen=True)
class App:
    """One call.

    Attributes:
        bids_dir: fMRIPrep-like derivatives, with runs in MNI space; raw BIDS where the model was trained on registered
            runs.
        out_dir: the BIDS derivative that is written.
        work_dir: where prepared runs are kept; needed only to go on.
        model: the released model.
        entries: of `configs/inference.json`, beside those that say where things are.
        atlas: whose regions the pages show.
    """

    bids_dir: Path
    out_dir: Path
    work_dir: Path
    model: ReleasedModel
    entries: Mapping[str, Any]
    atlas: str

    @property
    def made_with(self) -> dict[str, Any]:
        """What shapes every prediction, JSON: differing ones cannot stand in one table."""
        facts = {"model": self.model.record["sha256"], "version": metadata()["version"], "config": self.entries}
        return json.loads(json.dumps(facts))


def run_participants(
    bids_dir: str | Path,
    out_dir: str | Path,
    model: str | Path,
    labels: Sequence[str] = (),
    work_dir: str | Path | None = None,
    atlas: str = AAL3,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Score participants one after another, those left out that are scored already with the same input and settings.

    Several calls may work at the same time, each for other participants.

    Args:
        bids_dir: derivatives as fMRIPrep writes them.
        out_dir: where the BIDS derivative goes.
        model: `model.pt` of `python -m scripts release`, or the checkpoint of a classifier.
        labels: participants, with "sub-" or without; none: all.
        work_dir: for what is needed only to go on: prepared runs, and the engine's own output; by default the output's
            folder with -work after its name.
        atlas: of the training, see `ReleasedModel.entries`.
        options: further entries of `configs/inference.json`.

    Raises:
        InputError: a folder, model, option or label cannot be used, and nothing was done; or somebody could not be
            scored, or not with all runs, and all others are done.
    """
    participants(bids_dir, labels)  # what is wrong there is said before the model is read
    bids_dir, out_dir = Path(bids_dir), Path(out_dir)
    work_dir = out_dir.with_name(f"{out_dir.name}-work") if work_dir is None else Path(work_dir)
    _refuse_folders(bids_dir, out_dir, work_dir)
    options = dict(options or {})
    _refuse_options(options)
    if not Path(model).with_suffix(".json").is_file():
        model = release(model, work_dir / "model")
    released = ReleasedModel(model)
    found = participants(bids_dir, labels, released.preparation.native)
    app = App(bids_dir, out_dir, work_dir, released, released.entries(atlas) | options, atlas)
    _describe_dataset(app)
    status = {}
    for number, (name, paths) in enumerate(found.items(), start=1):
        logger.info("%s, %d of %d", name, number, len(found))
        status[name] = _participant(app, name, paths)
    _refuse_unscored({name: (kind, reason) for name, (kind, reason) in status.items() if kind != SCORED}, len(status))


def participants(bids_dir: str | Path, labels: Sequence[str] = (), native: bool = False) -> dict[str, list[Path]]:
    """The files of the chosen participants of a derivatives folder, by sub-<label>.

    Raises:
        InputError: there is no such folder, it holds nobody, or not one of those who are asked for.
    """
    if not Path(bids_dir).is_dir():
        raise InputError(f"{bids_dir} is not a folder; give the derivatives folder that holds the sub-* folders")
    found = files_by_participant(Path(bids_dir), native)
    if not found:
        raise InputError(f"{bids_dir} holds no sub-* folder; give the derivatives folder of fMRIPrep")
    wanted = dict.fromkeys(f"sub-{label.removeprefix('sub-')}" for label in labels) or found
    if missing := [name for name in wanted if name not in found]:
        raise InputError(
            f"{bids_dir} holds no folder {missing[0]}, but {len(found)} others, such as {min(found)}; correct "
            "--participant_label"
        )
    return {name: found[name] for name in wanted}


def _refuse_folders(bids_dir: Path, out_dir: Path, work_dir: Path) -> None:
    if out_dir.resolve() == bids_dir.resolve():
        raise InputError(f"{out_dir} is the input too; give a folder of its own for the output")
    if work_dir.resolve().is_relative_to(out_dir.resolve()):
        raise InputError(f"--work_dir {work_dir} lies in {out_dir}, which is to be valid BIDS; give one outside")
    described = out_dir / "dataset_description.json"
    if described.is_file() and _description()["GeneratedBy"][0]["Name"] not in described.read_text():
        raise InputError(f"{described} is of another dataset; give a folder of its own for the output")


def _refuse_options(options: Mapping[str, Any]) -> None:
    known = set(ConfigParser.load_config_file(config_file("inference"))) - set(_OWN)
    if unknown := [name for name in options if name.split("#")[0] not in known]:
        raise InputError(
            f"--{unknown[0]}: neither an option of app nor an entry of configs/inference.json that can be set here"
        )


def _refuse_unscored(bad: Mapping[str, tuple[str, str]], count: int) -> None:
    if bad:
        name, (kind, reason) = next(iter(bad.items()))
        raise InputError(
            f"{len(bad)} of {count} participants are not scored, or not with all runs, and the others are done; the "
            f"first is {name} ({kind}): {reason}"
        )


def _description() -> dict[str, Any]:
    about = metadata()
    made = {"Name": about["name"], "Version": about["version"], "Description": "python -m scripts app"}
    return {
        "Name": f"Predictions of {about['name']}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [made],
    }


def _describe_dataset(app: App) -> None:
    """Write what BIDS asks for beside the data; the input is named relative to it, so that no path is given away."""
    link = Path(os.path.relpath(app.bids_dir.resolve(), app.out_dir.resolve())).as_posix()
    source: dict[str, Any] = {"URL": link}
    theirs = app.bids_dir / "dataset_description.json"
    if theirs.is_file():
        try:
            said = json.loads(theirs.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{theirs} cannot be read as JSON ({error}); correct it") from error
        source |= {key: said[name] for key, name in (("DOI", "DatasetDOI"),) if said.get(name)}
    description = _description() | {"SourceDatasets": [source], "DatasetLinks": {SOURCE: link}}
    description["GeneratedBy"][0]["Description"] += f", model sha256 {app.model.record['sha256']}"
    write_json(app.out_dir / "dataset_description.json", description)
    write_text(app.out_dir / ".bidsignore", f"*.html\n{AUDIT}\n")
    write_text(app.out_dir / "README.md", _README.format(**metadata()))


def _participant(app: App, name: str, paths: Sequence[Path]) -> tuple[str, str]:
    """Score one participant and write the results; what goes wrong with them becomes the reason.

    Returns:
        The status, and the reason where it is not `SCORED`.
    """
    runs: list[Run] = []
    try:
        native = app.model.preparation.native
        if not paths and native:
            raise InputError(f"{app.bids_dir / name} holds no raw func/*_bold.nii.gz, which the model needs; give them")
        if not paths:
            raise InputError(f"{app.bids_dir / name} holds no func/*_space-MNI*_desc-preproc_bold.nii.gz; run fMRIPrep")
        runs = runs_of(paths, app.bids_dir, labels="optional", native=native)
        if _is_current(app, name, runs):
            logger.info("%s is scored already", name)
            return SCORED, ""
        own = app.work_dir / name  # nothing of an earlier call is to be taken for this one's
        _remove(own / "predictions.tsv", own / "store" / "summary.tsv", *_places(app.out_dir, name))
        return _score(app, name, runs)
    except WriteError:
        raise
    except InputError as error:
        reason = str(error)
    except Exception as error:
        logger.exception("%s failed unexpectedly", name)
        reason = f"failed unexpectedly: {type(error).__name__}: {error}"
    _remove(*_places(app.out_dir, name))
    _write_results(app, name, runs, FAILED, reason)
    return FAILED, reason


def _places(out_dir: Path, name: str) -> tuple[Path, Path, Path]:
    """A participant's table, what it means, and the page; the table is written last."""
    table = out_dir / "phenotype" / f"{name}_prediction.tsv"
    return table, table.with_suffix(".json"), out_dir / f"{name}.html"


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _is_current(app: App, name: str, runs: Sequence[Run]) -> bool:
    """Whether a participant is scored in full, by the same model with the same entries, and of the same files."""
    table, about, page = _places(app.out_dir, name)
    if not (table.is_file() and about.is_file() and page.is_file()):
        return False
    said = json.loads(about.read_text(encoding="utf-8"))
    if said["status_of_participant"] != SCORED or said["made_with"] != app.made_with:
        return False
    with parallel_map(1, None) as each:
        identities = identify_runs(app.model.preparation, runs, {}, each)
    return said["inputs"] == {run["run_id"]: identity for run, identity in zip(runs, identities, strict=True)}


def _score(app: App, name: str, runs: Sequence[Run]) -> tuple[str, str]:
    """Run the engine for one participant, and write what it has found."""
    own = app.work_dir / name
    columns = ("run_id", "participant_id", "bold", "mask", "confounds", "site")
    table = pd.DataFrame([{column: run[column] for column in columns} for run in runs])
    for column in ("bold", "mask", "confounds"):
        table[column] = [None if path is None else str(Path(path).absolute()) for path in table[column]]
    write_text(own / "runs.tsv", table.to_csv(sep="\t", index=False))
    parser = ConfigParser(ConfigParser.load_config_file(config_file("inference")))
    places = {"bundle_root": str(ROOT), "dataset_dir": str(own / "runs.tsv"), "output_dir": str(own)}
    parser.update(places | {"checkpoint": str(app.model.path)} | dict(app.entries))
    try:
        with unwrapped():
            parser.get_parsed_content("run")
    except WriteError:
        raise
    except InputError as error:
        refused = [run["reason"] for run in _summary(own / "store") if run["status"] in REFUSED]
        reason = "; ".join(refused) or str(error)
        if not (own / "predictions.tsv").is_file():
            raise InputError(reason) from error
        _write_results(app, name, runs, INCOMPLETE, reason)
        return INCOMPLETE, reason
    _write_results(app, name, runs, SCORED, "")
    return SCORED, ""


def _write_results(app: App, name: str, runs: Sequence[Run], status: str, reason: str) -> None:
    """Write a participant's page and table from what the engine has left in the participant's own folder."""
    own = app.work_dir / name
    row: dict[str, str] = {"participant_id": name, "status": status}
    about: dict[str, Any] = {"columns": {}, "intended_use": metadata()["intended_use"], "warnings": {}, "versions": {}}
    if status != FAILED:
        (found,) = pd.read_csv(own / "predictions.tsv", sep="\t", dtype=str, keep_default_na=False).to_dict("records")
        row |= {str(column): value or "n/a" for column, value in found.items() if column != "participant_id"}
        about = json.loads((own / "predictions.json").read_text(encoding="utf-8"))
    prepared, stored = _summary(own / "store") if runs else [], read_records(own / "store")
    used = {run["run_id"]: stored[run["run_id"]] for run in prepared if run["status"] not in REFUSED}
    keys = ("source_sha256", "mask_sha256", "confounds_sha256", "tr_in", "space", "parameters_hash")
    meanings = {"status": "; ".join(f"{word}: {meaning}" for word, meaning in STATUS.items())} | about["columns"]
    facts = {key: value for key, value in about.items() if key != "columns"} | {
        "Description": f"Predicted from the BOLD runs of {name}: {app.model.task.column}",
        "model": app.model.record,
        "status_of_participant": status,
        "reason": reason,
        "made_with": app.made_with,
        "inputs": {run_id: {key: record[key] for key in keys} for run_id, record in used.items()},
        "runs": prepared,
        "Sources": [f"bids:{SOURCE}:{Path(run['bold']).relative_to(app.bids_dir).as_posix()}" for run in runs],
    }
    facts = _without_paths(facts, f"{app.bids_dir.absolute()}{os.sep}")
    table, sidecar, page = _places(app.out_dir, name)
    pictures = {run_id: stored_picture(own / "store", app.atlas, run_id) for run_id in used}
    write_participant_page(page, row, meanings, facts, pictures)
    write_json(sidecar, _column_facts(row, meanings) | {"MeasurementToolMetadata": _tool(app)} | facts)
    text = pd.DataFrame([row]).to_csv(sep="\t", index=False)
    append_line(app.out_dir / AUDIT, _hashes(app, runs, row, text))  # first: no result is without its line
    write_text(table, text)


def _hashes(app: App, runs: Sequence[Run], row: Mapping[str, str], text: str) -> dict[str, Any]:
    """What the audit log says of a result: `text` is the participant's table, `row` what stands in it."""
    files = [run[key] for run in runs for key in ("bold", "mask", "confounds") if run[key]]
    made = app.made_with
    config = json.dumps(made["config"], sort_keys=True).encode()
    return {
        "software": f"{metadata()['name']} {made['version']}",
        "model": made["model"],
        "config": sha256(config).hexdigest(),
        "inputs": [file_sha256(path) if os.access(path, os.R_OK) else None for path in files],
        "status": row["status"],
        "flag": row.get("flag"),
        "output": sha256(text.encode()).hexdigest(),
    }


def _column_facts(columns: Sequence[str] | Mapping[str, Any], meanings: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"Description": meanings[name]} for name in columns if name in meanings}


def _tool(app: App) -> dict[str, str]:
    made = _description()["GeneratedBy"][0]
    what = f"{made['Name']} {made['Version']}: {app.model.task.column} as predicted from resting-state BOLD"
    return {"Description": f"{what}, by the model of sha256 {app.model.record['sha256']}"}


def _summary(store: Path) -> list[dict[str, Any]]:
    """The engine's table of runs; none where it did not come so far."""
    path = store / "summary.tsv"
    if not path.is_file():
        return []
    rows = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False).to_dict("records")
    text = ("run_id", "participant_id", "reason", "warnings")
    return [{str(key): value if key in text else _value(value) for key, value in row.items()} for row in rows]


def _value(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text or None


def _without_paths(content: Any, start: str) -> Any:
    """JSON with paths counted from the input's folder."""
    if isinstance(content, dict):
        return {key: _without_paths(value, start) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value, start) for value in content]
    return content.replace(start, "") if isinstance(content, str) else content


def write_group(bids_dir: str | Path, out_dir: str | Path, labels: Sequence[str] = ()) -> None:
    """Write one table and one page of all participants, from what the level "participant" has left.

    Args:
        bids_dir: as for `run_participants`; who is there and not scored yet has a row, too.
        out_dir: as for `run_participants`.
        labels: participants, with "sub-" or without; none: all.

    Raises:
        InputError: nobody is scored yet; participants were scored by different models or with different entries, and
            nothing was written; or somebody is not scored, or not with all runs, and the table is written.
    """
    names, out_dir = participants(bids_dir, labels), Path(out_dir)
    rows, facts = [], {}
    for name in names:
        table, about, _ = _places(out_dir, name)
        if not table.is_file():
            rows.append({"participant_id": name, "status": ABSENT})
            continue
        rows += pd.read_csv(table, sep="\t", dtype=str, keep_default_na=False).to_dict("records")
        facts[name] = json.loads(about.read_text(encoding="utf-8"))
    if not facts:
        raise InputError(f"{out_dir} holds no predictions of these participants; run the level participant first")
    first = next(iter(facts))
    for name, said in facts.items():
        if said["made_with"] != facts[first]["made_with"]:
            raise InputError(
                f"{out_dir}: {first} and {name} were not scored by the same model with the same options and version; "
                "run the level participant again, or give each a folder of its own"
            )
    described = {key: value for said in facts.values() for key, value in said.items()}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    whole = pd.DataFrame(rows, columns=columns).fillna("n/a")
    meanings = {name: described[name]["Description"] for name in columns if name in described}
    path = out_dir / "phenotype" / "prediction.tsv"
    shared = ("MeasurementToolMetadata", "intended_use", "made_with")
    write_json(path.with_suffix(".json"), _column_facts(columns, meanings) | {key: described[key] for key in shared})
    write_text(path, whole.to_csv(sep="\t", index=False))
    write_group_page(out_dir / "group.html", whole.to_dict("records"), meanings, facts)
    logger.info("Wrote %d participants to %s and %s", len(whole), path, out_dir / "group.html")
    reasons = {name: said["reason"] for name, said in facts.items()}
    bad = {
        row["participant_id"]: (row["status"], reasons.get(row["participant_id"], STATUS[ABSENT]))
        for row in whole.to_dict("records")
        if row["status"] != SCORED
    }
    _refuse_unscored(bad, len(whole))
