"""Prepare a dataset: every run from NIfTI to the store, skipping what is current and naming what failed."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bundle.anatomy import atlas, grid
from bundle.anatomy.parcels import dense
from bundle.errors import InputError
from bundle.files import WriteError, file_sha256, versions
from bundle.preparation import run_report, store
from bundle.preparation.bold import open_bold
from bundle.preparation.chain import Preparation, load_preparation
from bundle.preparation.motion import mean_fd
from bundle.preparation.pictures import stored_picture
from bundle.preparation.seen import IDENTITY, fingerprint, read_seen, source_stamps, write_seen
from bundle.preparation.sources import Run
from bundle.preparation.transforms import StoreRund
from bundle.workers import parallel_map, uncollected

logger = logging.getLogger(__name__)

PARTICIPANT_COLUMNS = ("participant_id", "site", "diagnosis", "participant")
GOOD_OVERLAP = 0.8  # less of the MNI152 brain mask is worth a look
LARGE_BRAIN = 1.5  # and so is a brain mask of this many times its volume
_STORED = ("prepared", "updated", "current")
_STATUSES = (*_STORED, "excluded", "failed")
_PACKAGES = ("numpy", "scipy", "nibabel", "nilearn", "monai", "torch")


class ExcludedError(InputError):
    """A run that could be prepared is left out, as the user chose."""


def prepare(
    runs: Sequence[Run],
    store_at: str | Path | StoreRund,
    preparation: Preparation | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    pictures: bool = False,
    rehash: bool = False,
) -> dict[str, Any]:
    """Prepare runs into a store; a bad run is listed with its reason and never stops the others.

    A run is current, and skipped, when its files' hashes, TR, space and the preparation's parameters are those it was
    prepared with and its arrays are intact. When only its participant's columns or the atlas changed, only its record
    is rewritten. Files whose size, times and inode are those of the last time (`bundle.files.stamp_of`) are not read.
    The store gets summary.tsv and report.html, one row per run. Interrupted and started again, or shared out among
    any number of workers, it ends with the same bytes, less what it remembers of these times.

    Args:
        runs: from `bundle.preparation.sources`.
        store_at: the store's folder, made if absent, or the transform that writes to it.
        preparation: the steps; None takes those of configs/prepare.json.
        workers: processes on this machine; each needs about 2 GiB for a run of 400 frames.
        scheduler: address of a Dask scheduler whose workers are used instead; they must see the same files.
        pictures: draw each stored run that report.html shows and that has no picture yet, and show the pictures there.
        rehash: read every file again, whatever its size and times are.

    Returns:
        {"rows": one dictionary per run ("run_id", "participant_id", "status", "reason", ...), "prepared": n,
        "updated": n, "current": n, "excluded": n, "failed": n}; the caller decides what a failure means.

    Raises:
        InputError: there are no runs, the atlas cannot be used, a worker process was killed, or Dask cannot be used.
        WriteError: the store cannot be written; nothing half-written is left, and running again goes on.
    """
    if not runs:
        raise InputError("there are no runs to prepare; check the source")
    preparation = preparation or load_preparation()
    preparation = replace(preparation, atlas=atlas.located(preparation.atlas))  # for workers elsewhere
    atlas.load_atlas(preparation.atlas)  # what is wrong with it is said once, not of every run
    if preparation.native:
        logger.warning("runs are registered by one affine transform each, which is no substitute for fMRIPrep")
    write = store_at if isinstance(store_at, StoreRund) else StoreRund(store_at)
    folder = write.folder
    store.clean_unfinished(folder)
    with uncollected():
        stored = store.read_records(folder)
        store.write_manifest(folder, preparation.parameters(), preparation.parameters_hash)
        stamps = [source_stamps(run) for run in runs]  # before anything is read
        seen = {} if rehash else read_seen(folder)
        wanted = preparation.parameters_hash
        same = [
            (record := stored.get(run["run_id"])) is not None
            and record["parameters_hash"] == wanted
            and run["run_id"] in seen
            and seen[run["run_id"]] == fingerprint(run, own, record, folder)
            for run, own in zip(runs, stamps, strict=True)
        ]

    with parallel_map(workers, scheduler) as each:
        identities = identify_runs(preparation, runs, stored, each, same)
        rows = [
            _plan(preparation, run, identity, stored.get(run["run_id"]), folder, known)
            for run, identity, known in zip(runs, identities, same, strict=True)
        ]
        todo = [number for number, row in enumerate(rows) if row["status"] == "to do"]
        tasks = [(runs[number], identities[number]) for number in todo]
        for number, row in zip(todo, each(partial(_attempt, preparation, write), tasks, "preparing"), strict=True):
            rows[number] = row
        shown = run_report.shown(rows) if pictures else ()
        ids = [row["run_id"] for row in shown if row["status"] in _STORED]
        draw = partial(stored_picture, folder, preparation.atlas)
        drawn = dict(zip(ids, each(draw, ids, "drawing"), strict=True)) if pictures else None
    for row in rows:
        if row["status"] == "excluded":
            store.remove_run(folder, row["run_id"])
        elif row["status"] == "failed" and row["run_id"] in stored:
            row["reason"] += "; the store still holds the version prepared earlier"

    with uncollected():
        manifest = store.write_manifest(folder, preparation.parameters(), preparation.parameters_hash)
        records = {record["run_id"]: record for record in manifest["runs"]}
        found = {
            run["run_id"]: seen[run["run_id"]] if known else fingerprint(run, own, records[run["run_id"]], folder)
            for run, own, known, row in zip(runs, stamps, same, rows, strict=True)
            if row["status"] in _STORED and run["run_id"] in records
        }
        write_seen(folder, found)
    if unlisted := sorted({run["run_id"] for run in manifest["runs"]} - {run["run_id"] for run in runs}):
        logger.warning(
            "%s holds %d runs that are not in this source and stay in use, such as %s; where they should not be, take "
            "their folders out of %s/runs and prepare again", folder, len(unlisted), unlisted[0], folder,
        )  # fmt: skip
    low = {"coverage": preparation.min_coverage, "mni_overlap": GOOD_OVERLAP}
    run_report.write(rows, folder, "summary.tsv", "report.html", f"Prepared runs of {Path(folder).name}", drawn, low)
    counts = {status: sum(row["status"] == status for row in rows) for status in _STATUSES}
    logger.info("%s: %s", folder, ", ".join(f"{count} {status}" for status, count in counts.items()))
    for row in rows:
        if row["status"] == "excluded" or row["warnings"]:
            logger.warning("%s: %s", row["run_id"], row["reason"] or row["warnings"])
    return {"rows": rows} | counts


def refuse_failed_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Turn failures among the rows of `prepare` into an error, so that the exit status tells of them.

    Raises:
        InputError: at least one run failed; names how many, the first and its reason.
    """
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(rows)} runs failed and the others are done; the first is {failed[0]['run_id']}: "
            f"{failed[0]['reason']} (all are in the summary and the report)"
        )


def identify_runs(
    preparation: Preparation,
    runs: Sequence[Run],
    stored: Mapping[str, dict],
    each: Callable,
    same: Sequence[bool] | None = None,
) -> list[dict[str, Any]]:
    """What decides whether each run is current, duplicates marked; {"problem": why} where a run cannot be used.

    Args:
        preparation: the steps.
        runs: from `bundle.preparation.sources`.
        stored: records of the store by run id.
        each: maps over runs, see `bundle.workers.parallel_map`.
        same: which runs' files are known to be those of their record; None: of none.
    """
    same = same or [False] * len(runs)
    looked_at = [run for run, known in zip(runs, same, strict=True) if not known]
    found = iter(each(partial(_identify, preparation), looked_at, "checking"))
    identities = [
        {key: stored[run["run_id"]][key] for key in IDENTITY} if known else next(found)
        for run, known in zip(runs, same, strict=True)
    ]
    _refuse_duplicates(runs, identities, stored)
    return identities


def _identify(preparation: Preparation, run: Run) -> dict[str, Any]:
    """What decides whether a stored run is current; {"problem": why} where the run cannot be used."""
    if "problem" in run:
        return {"problem": run["problem"]}
    try:
        store.check_run_id(run["run_id"])
        bold = open_bold(run["bold"], run["tr"], run["space"], preparation.native)
        files = sorted({holder.filename for holder in bold.image.file_map.values()})
        return {
            "source_sha256": file_sha256(*files),
            "mask_sha256": None if run["mask"] is None else file_sha256(run["mask"]),
            "confounds_sha256": _confounds_sha256(run, preparation),
            "tr_in": bold.tr,
            "space": bold.space,
            "parameters_hash": preparation.parameters_hash,
        }
    except InputError as error:
        return {"problem": str(error)}
    except Exception as error:
        logger.exception("checking %s failed unexpectedly", run["bold"])
        return {"problem": _unexpected(run, error)}


def _unexpected(run: Run, error: Exception) -> str:
    return f"{run['bold']} failed unexpectedly: {type(error).__name__}: {error}"


def _confounds_sha256(run: Run, preparation: Preparation) -> str | None:
    if not preparation.reads_confounds or run["confounds"] is None:
        return None
    return file_sha256(run["confounds"])


def _refuse_duplicates(runs: Sequence[Run], identities: Sequence[dict], stored: Mapping[str, dict]) -> None:
    """Mark every run whose id or content another run has too: which of them is right cannot be known."""
    by_id, by_content = defaultdict(list), defaultdict(list)
    ids = {run["run_id"] for run in runs}
    for index, (run, identity) in enumerate(zip(runs, identities, strict=True)):
        by_id[run["run_id"].casefold()].append(index)  # some disks take a and A for one name
        if "problem" not in identity:
            by_content[identity["source_sha256"]].append(index)
    others = {
        record["source_sha256"]: f"{run_id} in the store" for run_id, record in stored.items() if run_id not in ids
    }
    for members in by_id.values():
        for index in members if len(members) > 1 else ():
            identities[index]["problem"] = (
                f"{len(members)} runs have the run id {runs[index]['run_id']} (capitals aside); give each its own"
            )
    for run, identity in zip(runs, identities, strict=True):
        older = stored.get(run["run_id"])
        if older and "problem" not in identity and _is_another(run, identity, older):
            identity["problem"] = (
                f"the store holds another {run['run_id']}, from {older['source']}, than {run['bold']}; use a store of "
                f"its own or another run id, or take runs/{run['run_id']} out of the store if this one replaces it"
            )
    for content, members in by_content.items():
        if len(members) == 1 and content not in others:
            continue
        names = {index: f"{runs[index]['run_id']} ({runs[index]['bold']})" for index in members}
        for index in members:
            same = [name for other, name in names.items() if other != index]
            same += [others[content]] if content in others else []
            if same and "problem" not in identities[index]:
                identities[index]["problem"] = f"{names[index]} has the same content as {', '.join(same)}; keep one"


def _is_another(run: Run, identity: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether neither the content nor the place of the file is that of a stored run: likely another subject's."""
    return record["source_sha256"] != identity["source_sha256"] and record["source"] != str(
        Path(run["bold"]).absolute()
    )


def _plan(
    preparation: Preparation,
    run: Run,
    identity: Mapping[str, Any],
    stored: dict | None,
    folder: str | Path,
    same: bool,
) -> dict[str, Any]:
    """Decide on one run; rewrites the record where only the participant's columns or the atlas changed.

    Where its files, in the source and in the store, are known to be the `same`, none of them is opened.
    """
    if "problem" in identity:
        return row_of(run, preparation, "failed", reason=identity["problem"])
    if stored is None or any(stored.get(key) != value for key, value in identity.items()):
        return row_of(run, preparation, "to do")
    if not same and not store.is_intact(folder, stored):
        return row_of(run, preparation, "to do")
    if same and run["participant"] == stored["participant"]:
        columns = {key: run[key] for key in PARTICIPANT_COLUMNS}  # so head motion is the same as well
    else:
        columns = _of_participant(run)
        if columns["mean_fd"] is None and "registration" in stored:
            columns["mean_fd"] = stored["mean_fd"]  # as measured
    if stored.get("coverage_atlas") != atlas.load_atlas(preparation.atlas).sha256:
        columns |= _coverage(store.read_voxels(folder, run["run_id"]), preparation)
    record = stored | columns
    if preparation.on_low_coverage == "exclude" and (low := low_coverage(record, preparation)):
        return row_of(run, preparation, "excluded", reason=low, record=record)
    if record == stored:
        return row_of(run, preparation, "current", record=record)
    if "coverage" in columns:
        store.remove_picture(folder, run["run_id"])  # it shows the regions of another atlas
    store.write_record(folder, record)
    return row_of(run, preparation, "updated", record=record)


def _attempt(preparation: Preparation, write: StoreRund, task: tuple[Run, dict[str, Any]]) -> dict[str, Any]:
    """Prepare one run; its own faults become its row's reason, a store that cannot be written stops the job."""
    run, identity = task
    return attempt(run, preparation, lambda: write(prepared_item(run, identity, preparation)), "prepared")


def attempt(run: Run, preparation: Preparation, work: Callable[[], Mapping], status: str) -> dict[str, Any]:
    """Do one run's work and give its row; what goes wrong with the run becomes the row's reason."""
    try:
        return row_of(run, preparation, status, record=work()["record"])
    except WriteError:
        raise
    except ExcludedError as error:
        return row_of(run, preparation, "excluded", reason=str(error))
    except InputError as error:
        return row_of(run, preparation, "failed", reason=str(error))
    except Exception as error:
        logger.exception("preparing %s failed unexpectedly", run["bold"])
        return row_of(run, preparation, "failed", reason=_unexpected(run, error))


def prepared_item(run: Run, identity: Mapping[str, Any], preparation: Preparation) -> dict[Any, Any]:
    """Bring one run onto the grid, to the TR and to z.

    Args:
        run: from `bundle.preparation.sources`.
        identity: hashes and the like, to be kept in the record.
        preparation: parameters.

    Returns:
        "bold" (T, V) float16 z, "voxels" (V,), "moments" (2, V), and "record", as in run.json.

    Raises:
        InputError: the run cannot be used (`ExcludedError`: it is left out by choice).
    """
    item: dict[Any, Any] = {key: run[key] for key in ("bold", "mask", "confounds", "tr", "space")}
    item["record"] = {
        "run_id": run["run_id"],
        **_of_participant(run),
        **identity,
        "versions": versions((*_PACKAGES, *(["SimpleITK"] if preparation.native else []))),
    }
    for step in preparation.steps:
        item = step(item)
    item["record"] |= {"voxels": len(item["voxels"])} | _coverage(item["voxels"], preparation)
    if preparation.on_low_coverage == "exclude" and (low := low_coverage(item["record"], preparation)):
        raise ExcludedError(low)
    return item


def _of_participant(run: Run) -> dict[str, Any]:
    """What a record says that no frame depends on."""
    return {key: run[key] for key in PARTICIPANT_COLUMNS} | {"mean_fd": mean_fd(run)}


def _coverage(voxels: np.ndarray, preparation: Preparation) -> dict[str, Any]:
    """What a record says of the regions that brain voxels (V,) cover, and of whose regions these are."""
    loaded = atlas.load_atlas(preparation.atlas)
    brain = dense(np.ones(len(voxels), bool), voxels)
    return {"coverage": atlas.region_coverage(loaded, brain), "coverage_atlas": loaded.sha256}


def low_coverage(record: Mapping[str, Any], preparation: Preparation) -> str:
    """One sentence on the regions that a run covers too little, or nothing."""
    low = {name: share for name, share in record["coverage"].items() if share < preparation.min_coverage}
    if not low:
        return ""
    listed = ", ".join(f"{name} {share:.0%}" for name, share in low.items())
    return f"{record['run_id']} covers less than {preparation.min_coverage:.0%} of {listed}"


def row_of(
    run: Run, preparation: Preparation, status: str, reason: str = "", record: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A run's row of the summary and the reports."""
    row = {key: run[key] for key in ("run_id", "participant_id", "site", "diagnosis")}
    row |= {"status": status, "reason": reason, "warnings": ""}
    if record is None:
        return row
    row["warnings"] = "; ".join(_warnings(record, preparation))
    row |= {key: record[key] for key in ("axcodes_in", "space", "tr_in", "tr_source", "frames_in", "frames")}
    sizes = nib.affines.voxel_sizes(np.array(record["affine_in"]))
    row["voxel_mm"] = " x ".join(f"{size:.4g}" for size in sizes)
    row |= {key: record[key] for key in ("voxels", "mean", "sd", "mni_overlap")}
    row |= {f"coverage_{region}": share for region, share in record["coverage"].items()}
    row |= {key: value for key, value in record.get("registration", {}).items() if key != "method"}
    row["censored"] = record["cleaning"]["censored"] if record["cleaning"] else 0
    row |= {"source": record["source"], "source_sha256": record["source_sha256"]}
    return row if record["mean_fd"] is None else row | {"mean_fd": record["mean_fd"]}


@cache
def _mni_voxels() -> int:
    return int(grid.mni_brain().sum())


def _warnings(record: Mapping[str, Any], preparation: Preparation) -> list[str]:
    found = [low_coverage(record, preparation)]
    if record["mni_overlap"] < GOOD_OVERLAP:
        found.append(f"only {record['mni_overlap']:.0%} of the MNI brain is covered")
    times = record["voxels"] / _mni_voxels()
    if times > LARGE_BRAIN:
        found.append(f"its brain mask has {times:.1f} times the volume of the MNI brain; give one without background")
    if record["site"] is None:
        found.append("no site")
    return [warning for warning in found if warning]
