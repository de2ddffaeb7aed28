"""ADHD-200 as the Athena pipeline distributes it, and nilearn's sample of 40 subjects.

Athena: https://www.nitrc.org/plugins/mwiki/index.php/neurobureau:AthenaPipeline. Its runs are in MNI space at 4 mm:
`snwmrda<ID>_session_<N>_rest_<M>.nii.gz`, and the same band-passed, `sfnwmrda...`, whose values lie around 0.

A participant's columns dx, age, sex, handedness and handedness_score have these names whatever the table, and words for
codes; the others are as the table has them.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bundle.errors import InputError
from bundle.preparation.sources.participants import (
    Labels,
    Run,
    files_below,
    refuse_duplicate_runs,
    with_participant,
)

logger = logging.getLogger(__name__)

ATHENA = re.compile(r"sf?nwmrda(?P<id>\d{5,7})_session_(?P<session>\d+)_rest_(?P<rest>\d+)\.nii(\.gz)?")
NILEARN = re.compile(r"(?P<id>\d{7})_rest_tshift_RPI_voreg_mni\.nii(\.gz)?")
NILEARN_TABLE = "ADHD200_40subs_motion_parameters_and_phenotypics.csv"
NILEARN_SUBTYPES = {"adhd_combined": "adhd-combined", "adhd_inattentive": "adhd-inattentive"}
SITES = {
    1: "Peking",
    2: "Brown",
    3: "KKI",
    4: "NeuroIMAGE",
    5: "NYU",
    6: "OHSU",
    7: "Pittsburgh",
    8: "WashU",
}
"""Site codes of the phenotypic key, as all codes below:
https://fcon_1000.projects.nitrc.org/indi/adhd200/general/ADHD-200_PhenotypicKey.pdf."""
DX = {0: "control", 1: "adhd-combined", 2: "adhd-hyperactive/impulsive", 3: "adhd-inattentive"}
SEX = {"0": "female", "1": "male", "f": "female", "m": "male"}
HANDEDNESS = {"0": "left", "1": "right", "2": "ambidextrous", "l": "left", "r": "right"}
SCORES_HANDEDNESS = "NYU"
"""The site that gives a score of the Edinburgh inventory, -1 (left) to 1 (right), instead of a code."""
MISSING = ("-999", "-999.0", "pending", "withheld", "n/a", "nan", "")
ID = "ScanDir ID"
AGREE = ("site", "diagnosis", "dx", "sex")


def from_adhd200(
    paths: Sequence[Path], root: Path, participants: str | Path | None = None, labels: Labels = "required"
) -> list[Run]:
    """List Athena's runs, every session and run of every subject, with the phenotypic tables beside them.

    Args:
        paths: files; those named otherwise than Athena's runs are left out.
        root: the folder they were looked for in.
        participants: phenotypic table; by default every .csv and .tsv in `root`, the folders below it and the one
            above that has "ScanDir ID" and "DX", or, as the released key of the test set, "ID", "Site" and "DX". What
            one table leaves open is taken from the others.
        labels: see `from_bids`; a DX of -999, pending or withheld is a missing label.

    Returns:
        Runs sorted by run id (see the package). Participants are `sub-<ID of 7 digits>`, as in the BIDS release.

    Raises:
        InputError: band-passed and unfiltered versions of one run are both there, or a table cannot be used.
    """
    found = [(path, match) for path in paths if (match := ATHENA.fullmatch(path.name))]
    kinds = {path.name[:2] for path, _ in found}
    if len(kinds) > 1:
        raise InputError(
            f"{root} holds band-passed (sfnwmrda) and unfiltered (snwmrda) runs; choose one with a glob, such as "
            f"'{root}/**/sfnwmrda*.nii.gz'"
        )
    table = _phenotypes(root, participants, labels)
    runs = []
    for path, match in found:
        subject = match["id"].zfill(7)
        run = {
            "run_id": f"sub-{subject}_ses-{match['session']}_task-rest_run-{match['rest']}",
            "participant_id": f"sub-{subject}", "bold": path, "mask": None, "confounds": None, "tr": None,
            "space": "MNI152",
        }  # fmt: skip
        runs.append(_with_phenotype(run, table.get(subject), labels))
    return refuse_duplicate_runs(runs, root)


def from_nilearn_adhd(
    paths: Sequence[Path], root: Path, participants: str | Path | None = None, labels: Labels = "required"
) -> list[Run]:
    """List the runs of the folder that `nilearn.datasets.fetch_adhd` downloads, `<data_dir>/adhd`.

    Args:
        paths: files; those named otherwise than the sample's runs are left out.
        root: the folder, which holds `ADHD200_40subs_motion_parameters_and_phenotypics.csv`.
        participants: that table, if it lies elsewhere.
        labels: see `from_bids`.

    Returns:
        Runs sorted by run id (see the package), with their regressors as confounds. The TR is each header's: nilearn
        gives 2.0 s for all sites, which is not so for each of them.

    Raises:
        InputError: the table cannot be used.
    """
    given = participants or next((path for path in files_below(root) if path.name == NILEARN_TABLE), None)
    if given is None and labels == "required":
        raise InputError(f"{root} holds no {NILEARN_TABLE}; give the table, or labels=optional")
    table = {} if given is None else _nilearn_table(Path(given))
    runs = []
    for path in paths:
        if match := NILEARN.fullmatch(path.name):
            regressors = path.with_name(f"{match['id']}_regressors.csv")
            run = {
                "run_id": f"sub-{match['id']}_task-rest", "participant_id": f"sub-{match['id']}", "bold": path,
                "mask": None, "confounds": regressors if regressors.is_file() else None, "tr": None, "space": "MNI152",
            }  # fmt: skip
            runs.append(_with_phenotype(run, table.get(match["id"]), labels))
    return refuse_duplicate_runs(runs, root)


def _with_phenotype(run: Run, row: dict[str, Any] | None, labels: Labels) -> Run:
    problem = None if row is not None else f"{run['participant_id']} has no row in the phenotypic table"
    return with_participant(run, row or {}, labels, problem)


def _phenotypes(root: Path, given: str | Path | None, labels: Labels) -> dict[str, dict[str, Any]]:
    """Phenotypes by seven-digit id; a subject in several tables must be the same in all."""
    places = [*files_below(root), *root.resolve().parent.glob("*")]
    tables = [Path(given)] if given is not None else [p for p in sorted(set(places)) if p.suffix in (".csv", ".tsv")]
    by_id: dict[str, dict[str, Any]] = {}
    for path in tables:
        rows = _read(path)
        if ID not in rows or "dx" not in rows:
            if given is not None:
                raise InputError(f"{path} has no column {ID!r} or 'DX'; give ADHD-200's phenotypic table")
            continue
        people = [cells for cells in rows.to_dict("records") if cells[ID].strip()]  # a line without an id is nobody's
        for cells, row in zip(people, _named([_phenotype(cells, path) for cells in people], path), strict=True):
            name = cells[ID].strip().removesuffix(".0").zfill(7)
            known = by_id.get(name, {})
            if any(len({known.get(key), row.get(key)} - {None}) > 1 for key in AGREE):
                raise InputError(
                    f"{path} gives {cells[ID]} another site, diagnosis or sex than another table; correct it"
                )
            by_id[name] = row | {key: value for key, value in known.items() if value is not None}
    if not by_id and labels == "required":
        raise InputError(f"{root} holds no phenotypic table with {ID!r} and 'DX'; give it, or labels=optional")
    return by_id


def _read(path: Path) -> pd.DataFrame:
    """A table as text, under its columns' usual names: the sites' own tables write "ScanDirID" and "Dx"."""
    separator = "\t" if path.suffix == ".tsv" else ","
    try:
        rows = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding_errors="replace")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); check the path") from error
    plain = {name: re.sub(r"[^a-z]", "", name.lower()) for name in rows}
    usual = {"scandirid": ID, "dx": "dx", "site": "site", "age": "age", "gender": "sex", "handedness": "handedness"}
    if {"site", "dx"} <= set(plain.values()) and "scandirid" not in plain.values():
        usual["id"] = ID  # the key of the test set, and Peking's own table of it
    return rows.rename(columns=lambda name: usual.get(plain[name], name.strip()))


def _phenotype(cells: dict[str, str], path: Path) -> dict[str, Any]:
    values = {key: _value(text) for key, text in cells.items() if key != ID}
    dx, site = values["dx"], values.get("site")
    if dx is not None and not (isinstance(dx, int) and dx in DX):
        raise InputError(f"{path} has the DX {dx!r} for {cells[ID]}; it must be 0 to 3, -999, pending or withheld")
    word = None if dx is None else DX[dx]
    name = SITES.get(site, str(site)) if isinstance(site, int) else site
    return values | {"site": name, "diagnosis": None if dx is None else "control" if dx == 0 else "adhd", "dx": word}


def _named(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Participants with words for codes of sex and handedness; unknown codes are missing, with a warning."""
    unknown: Counter[str] = Counter()
    named = []
    for row in rows:
        row = row | {"handedness_score": None} if "handedness" in row else dict(row)
        hand = row.get("handedness")
        if isinstance(hand, float) or (isinstance(hand, int) and row["site"] == SCORES_HANDEDNESS):
            row |= {"handedness": None, "handedness_score": hand}
        for column, words in (("sex", SEX), ("handedness", HANDEDNESS)):
            if (value := row.get(column)) is not None:
                row[column] = words.get(str(value).lower())
                unknown[f"{column} {value!r}"] += row[column] is None
        named.append(row)
    for what, count in (+unknown).items():
        logger.warning("%s: the %s of %d participants is no code of ADHD-200, so it is missing", path, what, count)
    return named


def _value(text: str) -> int | float | str | None:
    """A cell's number, text, or None for what the key calls missing."""
    text = text.strip()
    if text.lower() in MISSING:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _nilearn_table(path: Path) -> dict[str, dict[str, Any]]:
    rows = _read(path)
    if missing := [column for column in ("Subject", "adhd", "site") if column not in rows]:
        raise InputError(f"{path} has no column {' or '.join(missing)}; give nilearn's {NILEARN_TABLE}")
    people = rows.to_dict("records")
    described = []
    for cells in people:
        values = {key: _value(text) for key, text in cells.items() if key != "Subject"}
        if values["adhd"] not in (0, 1, None):
            raise InputError(f"{path} has adhd {cells['adhd']!r} for {cells['Subject']}; it must be 0, 1 or empty")
        code = values.pop("adhd")
        subtypes = [word for column, word in NILEARN_SUBTYPES.items() if values.get(column) == 1]
        words = ["control"] if code == 0 else subtypes if code == 1 else []
        diagnosis = None if code is None else "adhd" if code else "control"
        described.append(values | {"diagnosis": diagnosis, "dx": words[0] if len(words) == 1 else None})
    names = [cells["Subject"].zfill(7) for cells in people]
    return dict(zip(names, _named(described, path), strict=True))
