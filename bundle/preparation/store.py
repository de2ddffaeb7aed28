"""The prepared store: one folder per run, written whole or not at all, read in clips.

store/manifest.json             every run's record, rebuilt from the folders
store/runs/<run_id>/frames.npy  (T, V) float16, each brain voxel by its own mean and SD over the run
store/runs/<run_id>/moments.npy (2, V) float64, these means and SDs, in the file's units
store/runs/<run_id>/voxels.npy  (V,) int32, flat C-order indices into `grid.SHAPE`
store/runs/<run_id>/run.json    the run's record: participant, provenance, mean and SD of the whole run, fill, coverage
store/runs/<run_id>/confounds.tsv   of a registered run, its motion, a row per frame as acquired, columns as fMRIPrep's
store/runs/<run_id>/picture.webp  where one was asked for, the run's mean with contours of its brain and the regions
store/.seen-records.json        which run.json the manifest holds, so that only others are read for the next one
store/.seen-sources.json        which source files were hashed, so that prepare hashes only others

The last two are of this disk: without them everything is read again, and nothing else changes.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bundle import files
from bundle.errors import InputError
from bundle.files import Stamp, remove_path, settled, stamp_of, unfinished_beside, write_text
from bundle.workers import uncollected

logger = logging.getLogger(__name__)

FORMAT = 2
_CHUNK_FRAMES = 64
_SEEN = ".seen-records.json"
_ARRAYS = ("frames", "voxels", "moments")
TRAINING_KEYS = frozenset(
    {
        "run_id", "participant_id", "site", "diagnosis", "participant", "frames", "parameters_hash", "source_sha256",
        "mask_sha256", "mask_source", "confounds_sha256",
    }
)  # fmt: skip
"""What training reads of each record; see `read_index`."""


def check_run_id(run_id: str) -> str:
    """Return a run's name if it can be a folder's name.

    Raises:
        InputError: it holds anything but letters, digits and `_ . + -`, or begins with a dot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", run_id):
        raise InputError(f"run id {run_id!r} may hold only letters, digits and _ . + -; rename it")
    return run_id


def write_run(
    store: str | Path,
    record: dict,
    frames: NDArray[np.float16],
    voxels: NDArray[np.integer],
    moments: NDArray[np.float64],
    confounds: pd.DataFrame | None = None,
) -> None:
    """Write one run so that a reader sees all of it or nothing, replacing an earlier version.

    Args:
        store: the store's folder, made if absent.
        record: what run.json will hold; needs "run_id".
        frames: (T, V), each voxel z-scored over the run (see `scaling.zscore`).
        voxels: (V,) flat C-order indices into `grid.SHAPE`.
        moments: (2, V) mean and SD of each voxel, in the file's units.
        confounds: the run's motion, where preparation has measured it.

    Raises:
        WriteError: the disk is full, read-only or forbidden; nothing half-written is left.
    """
    target = Path(store) / "runs" / check_run_id(record["run_id"])
    with unfinished_beside(target) as folder:
        folder.mkdir(parents=True)
        _save_rows(folder / "frames.npy", frames)
        np.save(folder / "voxels.npy", voxels.astype(np.int32))
        np.save(folder / "moments.npy", moments.astype(np.float64))
        if confounds is not None:
            confounds.to_csv(folder / "confounds.tsv", sep="\t", index=False, na_rep="n/a")
        (folder / "run.json").write_text(_json(record), encoding="utf-8")
        _move_into_place(folder, target)


def write_record(store: str | Path, record: dict) -> None:
    """Replace a run's run.json, whose frames stay as they are, and nothing else."""
    write_text(Path(store) / "runs" / record["run_id"] / "run.json", _json(record))


def remove_picture(store: str | Path, run_id: str) -> None:
    """Remove a run's picture, which is drawn anew where one is asked for."""
    (Path(store) / "runs" / run_id / "picture.webp").unlink(missing_ok=True)


def remove_run(store: str | Path, run_id: str) -> None:
    """Take a run out of the store; nothing happens where it holds no such run.

    Raises:
        WriteError: the store cannot be written.
    """
    target = Path(store) / "runs" / run_id
    if target.is_dir():
        with unfinished_beside(target) as away:
            target.rename(away)  # at once: a reader never sees half a run
            remove_path(away)


def write_manifest(store: str | Path, parameters: dict, parameters_hash: str) -> dict:
    """Rebuild manifest.json from the runs' folders and return it (see `read_manifest`).

    Records that the last manifest holds are taken from there while their files are the same, by `files.stamp_of`; where
    all are, it stays as it is. Killed at any time, it leaves the last manifest or the new one, whole.

    Raises:
        WriteError: the store cannot be written.
    """
    path = Path(store) / "manifest.json"
    head = {"format": FORMAT, "parameters": parameters, "parameters_hash": parameters_hash}
    last, known = _remembered(store)
    while True:
        before, known = known, _refreshed(store, known)
        manifest = head | {"runs": [record for _, record in known.values() if record]}
        if known == before and manifest == last:
            return manifest
        write_text(path, _manifest_text(manifest))
        if _record_stamps(store) == {run_id: stamp for run_id, (stamp, _) in known.items()}:
            break  # else another process has finished a run, and may have been overwritten
    seen = [[run_id, stamp if settled(stamp) else None] for run_id, (stamp, record) in known.items() if record]
    write_text(Path(store) / _SEEN, json.dumps({"manifest": stamp_of(path), "runs": seen}) + "\n")
    return manifest


def read_manifest(store: str | Path) -> dict[str, Any]:
    """Read what the store holds.

    Returns:
        {"format": 2, "parameters": {...}, "parameters_hash": str, "runs": [run.json, ...] sorted by run id}.

    Raises:
        InputError: there is no store, it has another format, or its runs' preparation parameters differ.
    """
    return _checked(_read_json(_manifest_at(store)), store)


def read_index(store: str | Path) -> dict[str, Any]:
    """As `read_manifest`, but with no more of each run than `TRAINING_KEYS`; not to be changed by who reads it.

    A process reads each manifest once, however often it asks: with half a million runs that is what starting takes.

    Raises:
        InputError: as `read_manifest`.
    """
    path = _manifest_at(store)
    return _checked(_read_index(path, tuple(stamp_of(path) or ())), store)


@lru_cache(maxsize=1)
def _read_index(path: Path, _stamp: tuple[int, ...]) -> dict[str, Any]:
    shared: dict[Any, Any] = {}

    def brief(content: dict[str, Any]) -> dict[str, Any]:
        if "run_id" not in content:
            return content
        kept = {key: value for key, value in content.items() if key in TRAINING_KEYS}
        for key in ("site", "diagnosis", "parameters_hash"):  # the same of many runs: one object, not one of each
            if isinstance(value := kept.get(key), str):
                kept[key] = shared.setdefault(value, value)
        return kept

    with uncollected():
        return _read_json(path, brief)


def _manifest_at(store: str | Path) -> Path:
    path = Path(store) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{store} is not a finished store (no manifest.json); run prepare, or check the path")
    return path


def _checked(manifest: dict[str, Any], store: str | Path) -> dict[str, Any]:
    if manifest.get("format") != FORMAT:
        path = Path(store) / "manifest.json"
        raise InputError(f"{path} has format {manifest.get('format')!r}, not {FORMAT}; prepare the data again")
    expected = manifest["parameters_hash"]
    stale = [run["run_id"] for run in manifest["runs"] if run["parameters_hash"] != expected]
    if stale:
        raise InputError(
            f"{store} mixes preparation parameters ({len(stale)} runs, first {stale[0]}, differ from the "
            "manifest); prepare all of its runs again with the same parameters"
        )
    return manifest


def read_records(store: str | Path) -> dict[str, dict]:
    """Read every run's run.json, by run id, in sorted order; a damaged one is left out with a warning.

    Those that the manifest holds are taken from there, see `write_manifest`.
    """
    known = _refreshed(store, _remembered(store)[1])
    return {run_id: record for run_id, (_, record) in known.items() if record}


Known = dict[str, tuple[Stamp, dict | None]]
"""Records by run id, in sorted order, with the stamps of the files that they were read from; None: a damaged one."""


def _remembered(store: str | Path) -> tuple[dict[str, Any], Known]:
    """The last manifest, and what is known by it without reading a run's folder.

    Both are empty where the manifest is not the one that was written last. They are kept for whoever asks next, so
    nobody may change them.
    """
    path = Path(store) / "manifest.json"
    return _last_manifest(path, tuple(stamp_of(path) or ()), tuple(stamp_of(path.with_name(_SEEN)) or ()))


@lru_cache(maxsize=1)
def _last_manifest(path: Path, stamp: tuple[int, ...], _seen_stamp: tuple[int, ...]) -> tuple[dict[str, Any], Known]:
    try:
        seen = json.loads(path.with_name(_SEEN).read_text(encoding="utf-8"))
        if seen["manifest"] != list(stamp):
            return {}, {}
        manifest = _read_json(path)
        both = list(zip(seen["runs"], manifest["runs"], strict=True))
    except (OSError, ValueError, KeyError, TypeError, InputError):  # absent or damaged: then all records are read
        return {}, {}
    return manifest, {run_id: (stamp, record) for (run_id, stamp), record in both if stamp}


def _refreshed(store: str | Path, known: Known) -> Known:
    """Records as they are now: of files with another stamp, or none so far, read."""
    found: Known = {}
    for run_id, stamp in _record_stamps(store).items():
        if run_id in known and known[run_id][0] == stamp:
            found[run_id] = known[run_id]
            continue
        try:
            found[run_id] = stamp, _read_json(Path(store) / "runs" / run_id / "run.json")
        except InputError as error:
            logger.warning("%s", error)
            found[run_id] = stamp, None
    return found


def _record_stamps(store: str | Path) -> dict[str, Stamp]:
    """The stamp of each run's run.json, by the name of its folder, sorted."""
    runs = Path(store) / "runs"
    names = sorted(entry.name for entry in os.scandir(runs) if entry.name[0] != ".") if runs.is_dir() else []
    stamps = ((name, stamp_of(f"{runs}/{name}/run.json")) for name in names)
    return {name: stamp for name, stamp in stamps if stamp}


def read_run(store: str | Path, run_id: str) -> dict:
    """Read one run's run.json.

    Raises:
        InputError: the store holds no such run.
    """
    return _read_json(_folder(store, run_id) / "run.json")


def read_voxels(store: str | Path, run_id: str) -> NDArray[np.int32]:
    """Read where a run's brain voxels lie: (V,) flat C-order indices into `grid.SHAPE`."""
    return np.array(_open_array(_folder(store, run_id), "voxels.npy"))


def read_moments(store: str | Path, run_id: str) -> NDArray[np.float64]:
    """Read each voxel's mean and SD over the run, (2, V), in the file's units."""
    return np.array(_open_array(_folder(store, run_id), "moments.npy"))


def content_sha256(store: str | Path, run_id: str) -> str:
    """Hash of where a run has voxels, and of their means and SDs: of its content, whatever its file is called."""
    folder = _folder(store, run_id)
    return files.file_sha256(folder / "voxels.npy", folder / "moments.npy")


def read_clip(store: str | Path, run_id: str, start: int, frames: int) -> NDArray[np.float16]:
    """Read some frames of a run, and only these from the disk.

    Args:
        store: the store's folder.
        run_id: the run.
        start: the first frame, from 0.
        frames: how many.

    Returns:
        (frames, V) float16, each voxel z-scored over the run.

    Raises:
        InputError: no such run, or the run has no such frames.
    """
    return read_drawn_clip(store, run_id, lambda _: start, frames)


def read_drawn_clip(store: str | Path, run_id: str, start_of: Callable[[int], int], frames: int) -> NDArray[np.float16]:
    """As `read_clip`, but the first frame depends on how many the run has: `start_of` is called with that number.

    The run's file is opened once, which is what one waits for on a network disk.
    """
    rows = _open_array(_folder(store, run_id), "frames.npy")
    start = start_of(len(rows))
    if frames < 1 or not 0 <= start <= len(rows) - frames:
        raise InputError(
            f"run {run_id} in {store} has {len(rows)} frames, so no clip of {frames} begins at frame {start}"
        )
    return np.array(rows[start : start + frames])


def read_values(store: str | Path, run_id: str, start: int, frames: int) -> NDArray[np.float32]:
    """Read some frames of a run, (frames, V), in the units of the file it came from; see `read_clip`."""
    mean, sd = read_moments(store, run_id)
    return (read_clip(store, run_id, start, frames) * sd + mean).astype(np.float32)


def count_frames(store: str | Path, run_id: str) -> int:
    """The number of frames of a stored run."""
    return len(_open_array(_folder(store, run_id), "frames.npy"))


def array_files(store: str | Path, run_id: str) -> list[str]:
    """The files of a run that hold its arrays: frames, voxels and moments."""
    return [f"{store}/runs/{run_id}/{name}.npy" for name in _ARRAYS]


def is_intact(store: str | Path, record: dict) -> bool:
    """Whether a run's arrays are there in full and have the shapes that its record says."""
    folder = Path(store) / "runs" / record["run_id"]
    try:
        frames, voxels, moments = (_open_array(folder, f"{name}.npy") for name in _ARRAYS)
    except InputError as error:
        logger.warning("%s", error)
        return False
    count = record["voxels"]
    return (frames.shape, voxels.shape, moments.shape) == ((record["frames"], count), (count,), (2, count))


def clean_unfinished(store: str | Path) -> None:
    """Remove what killed processes of this machine left behind; other machines' and live processes' stay."""
    for folder in (Path(store), Path(store) / "runs"):
        files.clean_unfinished(folder)


def _folder(store: str | Path, run_id: str) -> Path:
    folder = Path(store) / "runs" / run_id
    if not folder.is_dir():
        if not Path(store).is_dir():
            raise InputError(f"{store} is not there, or not any more; check the path, and that its disk is mounted")
        raise InputError(f"{store} holds no run {run_id}; prepare it, or check the name")
    return folder


def _open_array(folder: Path, name: str) -> NDArray:
    """Map an array of a run into memory, read-only; its values are read when they are used.

    As `np.load(..., mmap_mode="r")`, which opens the file three times.
    """
    try:
        with (folder / name).open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not of NumPy's format 1.0")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            order: Literal["F", "C"] = "F" if fortran_order else "C"
            return np.memmap(file, dtype, "r", file.tell(), shape, order)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder / name} is damaged or missing ({error}); prepare that run again") from error


def _save_rows(path: Path, frames: NDArray[np.float16]) -> None:
    """`np.save`, but a chunk at a time: a full disk is then an OSError, and a float32 array needs no copy."""
    header = {"descr": "<f2", "fortran_order": False, "shape": frames.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(frames), _CHUNK_FRAMES):
            file.write(np.ascontiguousarray(frames[start : start + _CHUNK_FRAMES], "<f2").data)


def _move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to its name, moving an older version, or another process's, out of the way."""
    while True:
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            old = folder.with_name(f"{folder.name}-old")
            with suppress(FileNotFoundError):  # another process has just moved it away
                target.rename(old)
                remove_path(old)
        else:
            return


def _json(content: dict) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


_encode = json.JSONEncoder(sort_keys=True, allow_nan=False).encode  # in C, other than with an indent


def _manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest as JSON, a line per run."""
    head = _encode({key: value for key, value in manifest.items() if key != "runs"})
    return head[:-1] + ', "runs": [\n' + ",\n".join(map(_encode, manifest["runs"])) + "\n]}\n"


def _read_json(path: Path, hook: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=hook)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); prepare that run again") from error
