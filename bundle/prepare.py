"""Prepare a dataset: every run from NIfTI to the store, skipping what is current and naming what failed."""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from bundle import atlas, grid, store
from bundle.bold import TR_RANGE, open_bold
from bundle.errors import InputError
from bundle.sources import Run
from bundle.transforms import (
    CLIP_FRAMES,
    CONSTANT,
    MIN_OVERLAP,
    TR_SECONDS,
    LoadBOLDd,
    ResampleTRd,
    StoreRund,
    ToGridd,
    ZScored,
)

logger = logging.getLogger(__name__)

PARTICIPANT_COLUMNS = ("participant_id", "site", "diagnosis", "participant")
_STATUSES = ("prepared", "updated", "current", "failed")
_PACKAGES = ("numpy", "scipy", "nibabel", "nilearn", "monai", "torch")
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Preparation:
    """What shapes a prepared run; a run prepared with other values is prepared again.

    Attributes:
        tr: spacing of the stored frames, seconds, 0.1 to 20.
        min_frames: the fewest frames a stored run may have.
        min_overlap: the least share, 0 to 1, of the MNI152 brain mask that a run's brain must contain.
    """

    tr: float = TR_SECONDS
    min_frames: int = CLIP_FRAMES
    min_overlap: float = MIN_OVERLAP

    def __post_init__(self) -> None:
        if not TR_RANGE[0] <= self.tr <= TR_RANGE[1]:
            raise InputError(f"the prepared TR must be {TR_RANGE[0]} to {TR_RANGE[1]} seconds, not {self.tr}")
        if self.min_frames < 1:
            raise InputError(f"min_frames must be at least 1, not {self.min_frames}")
        if not 0 <= self.min_overlap <= 1:
            raise InputError(f"min_overlap must be between 0 and 1, not {self.min_overlap}")

    def parameters(self) -> dict[str, Any]:
        """Everything that shapes the result, as JSON values."""
        return asdict(self) | {
            "grid_shape": list(grid.SHAPE),
            "grid_affine": grid.AFFINE.tolist(),
            "interpolation": "linear in world space and in time",
            "background": f"the given brain mask, else {CONSTANT}",
            "scaling": "z over all brain voxels and frames, population SD",
            "fill": "least z of the run",
            "dtype": "float16",
        }

    @property
    def parameters_hash(self) -> str:
        """sha256 of `parameters`, hexadecimal."""
        return hashlib.sha256(json.dumps(self.parameters(), sort_keys=True).encode()).hexdigest()


def prepare(
    runs: Sequence[Run],
    folder: str | Path,
    preparation: Preparation | None = None,
    workers: int = 1,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Prepare runs into a store; a bad run is listed with its reason and never stops the others.

    A run is current, and skipped, when its files' hashes, TR, space and the preparation's parameters are those it was
    prepared with and its arrays are intact. When only its participant's columns changed, only they are rewritten.
    The store gets summary.tsv, one row per run.

    Args:
        runs: from `bundle.sources`.
        folder: the store, made if absent.
        preparation: parameters; None takes the defaults.
        workers: processes on this machine; each needs about 2 GiB for a run of 400 frames.
        executor: used instead of own processes, for example a Dask client's `get_executor()` for many machines that
            share the files.

    Returns:
        {"rows": one dictionary per run ("run_id", "participant_id", "status", "reason", ...), "prepared": n,
        "updated": n, "current": n, "failed": n}; the caller decides what a failure means.

    Raises:
        InputError: there are no runs, or a worker process was killed.
        StoreWriteError: the store cannot be written; nothing half-written is left, and running again goes on.
    """
    if not runs:
        raise InputError("there are no runs to prepare; check the source")
    preparation = preparation or Preparation()
    store.clean_unfinished(folder)
    stored = store.read_records(folder)
    store.write_manifest(folder, preparation.parameters(), preparation.parameters_hash)

    pool: Any = nullcontext(executor)
    if executor is None and workers > 1:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool as active:
        identities = _each(partial(_identify, preparation), runs, active, "checking")
        _refuse_duplicates(runs, identities, stored)
        rows = [
            _plan(run, identity, stored.get(run["run_id"]), folder)
            for run, identity in zip(runs, identities, strict=True)
        ]
        todo = [index for index, row in enumerate(rows) if row["status"] == "to do"]
        tasks = [(runs[index], identities[index]) for index in todo]
        for index, row in zip(
            todo, _each(partial(_attempt, preparation, folder), tasks, active, "preparing"), strict=True
        ):
            rows[index] = row
    for row in rows:
        if row["status"] == "failed" and row["run_id"] in stored:
            row["reason"] += "; the store still holds the version prepared earlier"

    store.write_manifest(folder, preparation.parameters(), preparation.parameters_hash)
    store.write_text(Path(folder) / "summary.tsv", pd.DataFrame(rows).to_csv(sep="\t", index=False))
    counts = {status: sum(row["status"] == status for row in rows) for status in _STATUSES}
    logger.info("%s: %s", folder, ", ".join(f"{count} {status}" for status, count in counts.items()))
    return {"rows": rows} | counts


def refuse_failures(folder: str | Path) -> None:
    """Turn the failures that a store's summary.tsv lists into an error, so that the exit status tells of them.

    Raises:
        InputError: at least one run failed; names how many, the first and its reason.
    """
    path = Path(folder) / "summary.tsv"
    rows = pd.read_csv(path, sep="\t", keep_default_na=False)
    failed = rows[rows["status"] == "failed"]
    if len(failed):
        first = failed.iloc[0]
        raise InputError(
            f"{len(failed)} of {len(rows)} runs failed and the others are done; the first is {first['run_id']}: "
            f"{first['reason']} (all are in {path})"
        )


def _each(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], executor: Executor | None, what: str
) -> list[_Result]:
    try:
        results: Iterable[_Result] = executor.map(function, tasks) if executor else map(function, tasks)
        return list(tqdm(results, total=len(tasks), desc=what, unit="run"))
    except BrokenExecutor as error:
        raise InputError(
            "a worker process ended abruptly, most likely out of memory; run again with fewer workers, "
            "finished runs are kept"
        ) from error


def _identify(preparation: Preparation, run: Run) -> dict[str, Any]:
    """What decides whether a stored run is current; {"problem": why} where the run cannot be used."""
    if "problem" in run:
        return {"problem": run["problem"]}
    try:
        store.check_run_id(run["run_id"])
        bold = open_bold(run["bold"], run["tr"], run["space"])
        files = sorted({holder.filename for holder in bold.image.file_map.values()})
        return {
            "source_sha256": _sha256(files),
            "mask_sha256": None if run["mask"] is None else _sha256([run["mask"]]),
            "tr_in": bold.tr,
            "space": bold.space,
            "parameters_hash": preparation.parameters_hash,
        }
    except InputError as error:
        return {"problem": str(error)}


def _sha256(paths: Sequence[str | Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    return digest.hexdigest()


def _refuse_duplicates(runs: Sequence[Run], identities: Sequence[dict], stored: Mapping[str, dict]) -> None:
    """Mark every run whose id or content another run has too: which of them is right cannot be known."""
    by_id, by_content = defaultdict(list), defaultdict(list)
    for index, (run, identity) in enumerate(zip(runs, identities, strict=True)):
        by_id[run["run_id"]].append(index)
        if "problem" not in identity:
            by_content[identity["source_sha256"]].append(index)
    others = {
        record["source_sha256"]: f"{run_id} in the store" for run_id, record in stored.items() if run_id not in by_id
    }
    for run_id, members in by_id.items():
        for index in members if len(members) > 1 else ():
            identities[index]["problem"] = f"{len(members)} runs have the run id {run_id}; give each its own"
    for content, members in by_content.items():
        names = {index: f"{runs[index]['run_id']} ({runs[index]['bold']})" for index in members}
        for index in members:
            same = [name for other, name in names.items() if other != index]
            same += [others[content]] if content in others else []
            if same and "problem" not in identities[index]:
                identities[index]["problem"] = f"{names[index]} has the same content as {', '.join(same)}; keep one"


def _plan(run: Run, identity: Mapping[str, Any], stored: dict | None, folder: str | Path) -> dict[str, Any]:
    """Decide on one run; rewrites the record where only the participant's columns changed."""
    if "problem" in identity:
        return _row(run, "failed", reason=identity["problem"])
    if stored is None or any(stored.get(key) != value for key, value in identity.items()):
        return _row(run, "to do")
    if not store.is_intact(folder, stored):
        return _row(run, "to do")
    columns = {key: run[key] for key in PARTICIPANT_COLUMNS}
    if all(stored[key] == value for key, value in columns.items()):
        return _row(run, "current", record=stored)
    record = stored | columns
    store.write_record(folder, record)
    return _row(run, "updated", record=record)


def _attempt(preparation: Preparation, folder: str | Path, task: tuple[Run, dict[str, Any]]) -> dict[str, Any]:
    """Prepare one run; its own faults become its row's reason, a store that cannot be written stops the job."""
    run, identity = task
    try:
        return _row(run, "prepared", record=prepare_run(run, identity, folder, preparation))
    except store.StoreWriteError:
        raise
    except InputError as error:
        return _row(run, "failed", reason=str(error))
    except Exception as error:
        logger.exception("preparing %s failed unexpectedly", run["bold"])
        return _row(run, "failed", reason=f"{run['bold']} failed unexpectedly: {type(error).__name__}: {error}")


def prepare_run(run: Run, identity: Mapping[str, Any], folder: str | Path, preparation: Preparation) -> dict[str, Any]:
    """Bring one run onto the grid, to the TR and to z, and store it.

    Args:
        run: from `bundle.sources`.
        identity: hashes and the like, to be kept in the record.
        folder: the store.
        preparation: parameters.

    Returns:
        The run's record, as in run.json.

    Raises:
        InputError: the run cannot be used.
        StoreWriteError: the store cannot be written.
    """
    item: dict[Any, Any] = {key: run[key] for key in ("bold", "mask", "tr", "space")}
    for step in (
        LoadBOLDd(),
        ToGridd(min_overlap=preparation.min_overlap),
        ResampleTRd(tr=preparation.tr, min_frames=preparation.min_frames),
        ZScored(),
    ):
        item = step(item)
    brain = np.zeros(grid.SHAPE, bool)
    brain.ravel()[item["voxels"]] = True
    labels = atlas.labels_on(atlas.load_atlas(), grid.AFFINE, grid.SHAPE)
    item["record"] |= {
        "run_id": run["run_id"],
        **{key: run[key] for key in PARTICIPANT_COLUMNS},
        **identity,
        "coverage": atlas.region_coverage(labels, brain),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    return StoreRund(folder)(item)["record"]


def _row(run: Run, status: str, reason: str = "", record: Mapping[str, Any] | None = None) -> dict[str, Any]:
    row = {"run_id": run["run_id"], "participant_id": run["participant_id"], "status": status, "reason": reason}
    if record is not None:
        row |= {key: record[key] for key in ("frames", "voxels", "mean", "sd", "mni_overlap")}
        row |= {f"coverage_{region}": share for region, share in record["coverage"].items()}
    return row
