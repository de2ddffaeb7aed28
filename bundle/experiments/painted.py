"""Paint real region time courses into MNI volumes, so that everything that needs images can be tried on real dynamics.

Every voxel of a label has the course of its label: `mean * (1 + 1 % * z-scored course + 1 % * white noise + drift)`,
with the anatomy, noise and drift of `bundle.experiments.volumes`; voxels without a label have noise and drift only.
So the images tell about how regions vary together, and nothing about amplitudes or about patterns inside regions.
"""

import logging
import re
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from bundle.anatomy.atlas import load_atlas
from bundle.errors import InputError
from bundle.experiments.volumes import (
    DRIFT,
    NOISE,
    SIGNAL,
    Site,
    add_noise,
    is_written,
    of_voxels,
    site_anatomy,
    write_description,
    write_run,
    written_cohort,
)
from bundle.files import file_sha256, write_json
from bundle.preparation.sources.participants import read_table

logger = logging.getLogger(__name__)

WHAT = "real time courses painted into MNI volumes"


def paint(
    series: str | Path,
    folder: str | Path,
    participants: str | Path,
    atlas: str | Path,
    column: str,
    case: str | None = None,
    threshold: float | None = None,
    where: str | None = None,
    tr: float = 2.0,
    voxel_mm: float = 3.0,
    frames: int | None = None,
    seed: int = 0,
) -> Path:
    """Write the images, laid out like fMRIPrep derivatives; the folder appears complete or not at all.

    Beside the images it holds `participants.tsv` (participant_id, site, diagnosis, and the columns of `participants`)
    and `painted.json`, which says what this is and what it was made from.

    Args:
        series: .npz with `subjects` (n,) and `series` (n, frames, labels), a column per label of the atlas, ascending.
        folder: where to write; absent, empty, or the same images written before, which are then left as they are.
        participants: .tsv or .csv with the column participant_id and those that are named here.
        atlas: see `bundle.anatomy.atlas.load_atlas`.
        column: column of `participants` that makes someone a case (written as diagnosis "adhd") or a control.
        case: values of the column that make a case, with commas between; all other values make a control.
        threshold: instead of `case`: who has at least this number is a case.
        where: "COLUMN=VALUE": leave all others out.
        tr: time between frames in seconds, 0.1 to 20.
        voxel_mm: edge of the cubic voxels in mm, 1 to 8.
        frames: how many to take, from the first; by default all.
        seed: of the noise, at least 0. A subject's image does not depend on who else is painted, nor as what.

    Returns:
        The folder.

    Raises:
        InputError: an argument, a file or what is in it cannot be used, or the folder holds something else.
    """
    folder = Path(folder).absolute()
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number of at least 0, not {seed!r}.")
    site = Site("painted", float(tr), float(voxel_mm), axcodes="RAS", intensity=1000.0, dtype="int16")
    loaded = load_atlas(atlas)
    numbers = np.array(list(loaded.names))
    if np.any(np.diff(numbers) <= 0):
        raise InputError(
            f"the labels of {atlas} are not in ascending order in its table, as the columns of {series} must be"
        )
    subjects, courses = read_series(Path(series), len(numbers), frames)
    plan = plan_painted(subjects, Path(participants), column, case, threshold, where)
    files = {"series": series, "participants": participants}
    parameters = {
        "format": 3,
        "sha256": {name: file_sha256(path) for name, path in files.items()} | {"atlas": loaded.sha256},
        **{"column": column, "case": case, "threshold": threshold, "where": where},
        **{"tr": site.tr, "voxel_mm": site.voxel_mm, "frames": courses.shape[1], "seed": seed},
    }
    if is_written(folder, "painted.json", parameters, plan["participant_id"]):
        logger.info("%s already holds these images; nothing to do", folder)
        return folder
    anatomy = site_anatomy(site.voxel_mm, loaded)
    lost = sorted({int(number) for number in numbers} - set(anatomy.labels.tolist()))
    if lost:
        logger.warning("at %g mm %d labels have no voxel in the brain: %s", site.voxel_mm, len(lost), lost)
    with written_cohort(folder) as draft:
        write_description(draft, WHAT.capitalize(), "bundle.experiments.painted.paint")
        write_json(draft / "painted.json", describe(plan, parameters, files | {"atlas": loaded.source}, lost))
        plan.drop(columns="row").to_csv(draft / "participants.tsv", sep="\t", index=False, na_rep="n/a")
        for name, row in tqdm(plan[["participant_id", "row"]].to_numpy(), desc="painted", unit="subject"):
            change = SIGNAL * of_voxels(courses[row], numbers, anatomy.labels)
            add_noise(change, anatomy, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(row,))))
            write_run(draft, name, "painted", anatomy.mean[:, None] * (1 + change), site, anatomy)
    return folder


def read_series(path: Path, labels: int, frames: int | None) -> tuple[list[str], np.ndarray]:
    """Read time courses and z-score each over its frames.

    Args:
        path: see `paint`.
        labels: how many columns they must have.
        frames: how many to take, at least 2; None takes all.

    Returns:
        participant_id of each subject, beginning with "sub-", and their courses, (n, frames, labels) float32.

    Raises:
        InputError: the file cannot be read or is not as `paint` wants it, a value is not finite, or a course is flat.
    """
    try:
        with np.load(path) as file:
            subjects, series = file["subjects"], file["series"]
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{path} is not an .npz file with the arrays subjects and series ({error})") from error
    names = [f"sub-{str(name).removeprefix('sub-')}" for name in subjects.ravel()]
    if series.ndim != 3 or series.dtype.kind not in "fiu" or len(series) != len(names):
        raise InputError(
            f"{path} holds {series.dtype} series of shape {series.shape} for {len(names)} subjects; numbers of shape "
            "(subjects, frames, labels) are needed"
        )
    if series.shape[2] != labels:
        raise InputError(f"{path} has {series.shape[2]} columns, but the atlas has {labels} labels; they must agree")
    if wrong := [name for name in names if not re.fullmatch(r"sub-[A-Za-z0-9]+", name) or names.count(name) > 1]:
        raise InputError(f"{path} has the subject {wrong[0]!r}; give each a name of its own, of letters and digits")
    length = series.shape[1] if frames is None else frames
    if not isinstance(length, int) or not 2 <= length <= series.shape[1]:
        raise InputError(f"frames must be a whole number of 2 to {series.shape[1]}, not {length!r}.")
    series = series[:, :length].astype(np.float64)
    finite = np.isfinite(series).all(axis=(1, 2))
    if not finite.all():
        raise InputError(f"{path} has values that are NaN or infinite, of {names[int(np.argmin(finite))]} first")
    sd = series.std(axis=1, keepdims=True)
    if not sd.all():
        subject, _, label = np.argwhere(sd == 0)[0]
        raise InputError(f"{path} has a course that does not change, of {names[subject]} in column {label}")
    return names, ((series - series.mean(axis=1, keepdims=True)) / sd).astype(np.float32)


def plan_painted(
    subjects: list[str], table: Path, column: str, case: str | None, threshold: float | None, where: str | None
) -> pd.DataFrame:
    """Say who is painted, and as what.

    Args:
        subjects: participant_id of each row of the series.
        table: of the participants.
        column: see `paint`, like `case`, `threshold` and `where`.
        case: see `paint`.
        threshold: see `paint`.
        where: see `paint`.

    Returns:
        One row per painted subject: participant_id, site ("painted"), diagnosis ("control" or "adhd"), the table's
        other columns, of which age and sex are called so, row (in the series).

    Raises:
        InputError: a column, a participant or a value is missing, or all that are left are of one group.
    """
    if (case is None) == (threshold is None):
        raise InputError("give either case, the values of the column that make a case, or threshold, a number")
    kept, equals, value = (where or "").partition("=")
    if where is not None and not (kept and equals):
        raise InputError(f"where must be COLUMN=VALUE, not {where!r}.")
    rows = read_table(table, ["participant_id", column, *([kept] if kept else [])])
    rows.index = "sub-" + rows["participant_id"].astype(str).str.removeprefix("sub-")
    if missing := [name for name in subjects if name not in rows.index]:
        raise InputError(f"{table} has no row for {len(missing)} subjects of the series, such as {missing[0]}")
    if rows.index.has_duplicates:
        raise InputError(f"{table} has more than one row for {rows.index[rows.index.duplicated()][0]}; keep one")
    rows = rows.loc[subjects].assign(row=range(len(subjects)))
    rows = rows[rows[kept].map(_text) == value] if kept else rows
    if rows[column].isna().any():
        raise InputError(f"{table} has no {column} for {rows.index[rows[column].isna()][0]}; leave such out with where")
    if threshold is None:
        cases = rows[column].map(_text).isin([part.strip() for part in str(case).split(",")])
    elif pd.api.types.is_numeric_dtype(rows[column]):
        cases = rows[column] >= threshold
    else:
        raise InputError(f"{column} of {table} is not a number everywhere, which a threshold needs; give case instead")
    if cases.sum() in (0, len(cases)):
        raise InputError(f"{table} gives {cases.sum()} cases and {(~cases).sum()} controls; both are needed")
    plan = pd.DataFrame({"participant_id": rows.index, "site": "painted"}, index=rows.index)
    plan["diagnosis"] = np.where(cases, "adhd", "control")
    names = {"age": "age", "sex": "sex", "gender": "sex"}
    for found in rows.drop(columns="row"):
        name = names.get(str(found).lower(), found)
        plan[name] = plan[name] if name in plan else rows[found]
    return plan.assign(row=rows["row"]).reset_index(drop=True)


def describe(
    plan: pd.DataFrame, parameters: dict[str, Any], files: dict[str, str | Path], lost: list[int]
) -> dict[str, Any]:
    """Return what `painted.json` holds; `parameters` alone decide whether two folders are the same."""
    rule = parameters["case"] if parameters["threshold"] is None else f"at least {parameters['threshold']:g}"
    return {
        "what": WHAT,
        "diagnosis": f"adhd stands for {parameters['column']} {rule}, control for the others; no diagnosis is meant",
        "parameters": parameters,
        "files": {name: Path(path).name for name, path in files.items()},
        "subjects": {name: int(count) for name, count in plan["diagnosis"].value_counts().items()},
        "fraction_of_mean": {"signal": SIGNAL, "noise": NOISE, "drift": DRIFT},
        "labels_without_voxel": lost,
        "versions": {name: version(name) for name in ("numpy", "nibabel", "nilearn")},
    }


def _text(value: object) -> str:
    """A cell as it is typed: 1 for 1.0, which is how pandas reads whole numbers beside gaps."""
    return f"{value:g}" if isinstance(value, float) else str(value)
