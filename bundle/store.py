"""The prepared store: one folder per run, written whole or not at all, read in clips.

store/manifest.json             every run's record, rebuilt from the folders
store/runs/<run_id>/frames.npy  (T, V) float16, z-scored, brain voxels only
store/runs/<run_id>/voxels.npy  (V,) int32, flat C-order indices into `grid.SHAPE`
store/runs/<run_id>/run.json    the run's record: participant, provenance, mean, SD, fill, coverage
store/runs/<run_id>/picture.webp  where one was asked for, the run's mean with contours of its brain and the regions
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 1
_UNFINISHED = ".unfinished"
_CHUNK_FRAMES = 64


class StoreWriteError(InputError):
    """The store cannot be written (disk full, read-only); every later run would fail too."""


def check_run_id(run_id: str) -> str:
    """Return a run's name if it can be a folder's name.

    Raises:
        InputError: it holds anything but letters, digits and ``_ . + -``, or begins with a dot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", run_id):
        raise InputError(f"run id {run_id!r} may hold only letters, digits and _ . + -; rename it")
    return run_id


def slug(name: str) -> str:
    """A name with ``_`` for each character that not every file system keeps; two names may become the same."""
    return re.sub(r"[^A-Za-z0-9+-]", "_", name)


def write_run(store: str | Path, record: dict, frames: NDArray[np.float16], voxels: NDArray[np.integer]) -> None:
    """Write one run so that a reader sees all of it or nothing, replacing an earlier version.

    Args:
        store: the store's folder, made if absent.
        record: what run.json will hold; needs "run_id".
        frames: (T, V) z-scored.
        voxels: (V,) flat C-order indices into `grid.SHAPE`.

    Raises:
        StoreWriteError: the disk is full, read-only or forbidden; nothing half-written is left.
    """
    target = Path(store) / "runs" / check_run_id(record["run_id"])
    with _unfinished_beside(target) as folder:
        folder.mkdir(parents=True)
        _save_rows(folder / "frames.npy", frames)
        np.save(folder / "voxels.npy", voxels.astype(np.int32))
        (folder / "run.json").write_text(_json(record), encoding="utf-8")
        _move_into_place(folder, target)


def write_record(store: str | Path, record: dict) -> None:
    """Replace a run's run.json, whose frames stay as they are, and nothing else."""
    write_text(Path(store) / "runs" / record["run_id"] / "run.json", _json(record))


def remove_run(store: str | Path, run_id: str) -> None:
    """Take a run out of the store; nothing happens where it holds no such run.

    Raises:
        StoreWriteError: the store cannot be written.
    """
    target = Path(store) / "runs" / run_id
    if target.is_dir():
        with _unfinished_beside(target) as away:
            target.rename(away)  # at once: a reader never sees half a run
            _remove(away)


def write_manifest(store: str | Path, parameters: dict, parameters_hash: str) -> dict:
    """Rebuild manifest.json from the runs' folders and return it (see `read_manifest`).

    Raises:
        StoreWriteError: the store cannot be written.
    """
    while True:
        records = read_records(store)
        manifest = {
            "format": FORMAT,
            "parameters": parameters,
            "parameters_hash": parameters_hash,
            "runs": list(records.values()),
        }
        write_text(Path(store) / "manifest.json", _json(manifest))
        if read_records(store) == records:  # else another process has finished a run, and may have been overwritten
            return manifest


def write_text(path: Path, text: str) -> None:
    """Write a text file of the store, whole or not at all.

    Raises:
        StoreWriteError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of the store, whole or not at all.

    Raises:
        StoreWriteError: it cannot be written.
    """
    with _unfinished_beside(path) as unfinished:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, whole or not at all; NaN, which JSON lacks, becomes null.

    Raises:
        StoreWriteError: it cannot be written.
        ValueError: a number is infinite.
    """
    write_text(path, json.dumps(_nan_to_null(content), indent=1, allow_nan=False) + "\n")


def _nan_to_null(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _nan_to_null(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_nan_to_null(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def file_sha256(*paths: str | Path) -> str:
    """Hash of the bytes of one file, or of several one after another, hexadecimal.

    Raises:
        InputError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    return digest.hexdigest()


def read_manifest(store: str | Path) -> dict[str, Any]:
    """Read what the store holds.

    Returns:
        {"format": 1, "parameters": {...}, "parameters_hash": str, "runs": [run.json, ...] sorted by run id}.

    Raises:
        InputError: there is no store, it has another format, or its runs' preparation parameters differ.
    """
    path = Path(store) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{store} is not a finished store (no manifest.json); run prepare, or check the path")
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
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
    """Read every run's run.json, by run id, in sorted order; a damaged one is left out with a warning."""
    records = {}
    for path in sorted((Path(store) / "runs").glob("[!.]*/run.json")):
        try:
            records[path.parent.name] = _read_json(path)
        except InputError as error:
            logger.warning("%s", error)
    return records


def read_run(store: str | Path, run_id: str) -> dict:
    """Read one run's run.json.

    Raises:
        InputError: the store holds no such run.
    """
    return _read_json(_folder(store, run_id) / "run.json")


def read_voxels(store: str | Path, run_id: str) -> NDArray[np.int32]:
    """Read where a run's brain voxels lie: (V,) flat C-order indices into `grid.SHAPE`."""
    return np.array(_open_array(_folder(store, run_id), "voxels.npy"))


def read_clip(store: str | Path, run_id: str, start: int, frames: int) -> NDArray[np.float16]:
    """Read some frames of a run, and only these from the disk.

    Args:
        store: the store's folder.
        run_id: the run.
        start: the first frame, from 0.
        frames: how many.

    Returns:
        (frames, V) float16, z-scored.

    Raises:
        InputError: no such run, or the run has no such frames.
    """
    rows = _open_array(_folder(store, run_id), "frames.npy")
    if frames < 1 or not 0 <= start <= len(rows) - frames:
        raise InputError(
            f"run {run_id} in {store} has {len(rows)} frames, so no clip of {frames} begins at frame {start}"
        )
    return np.array(rows[start : start + frames])


def count_frames(store: str | Path, run_id: str) -> int:
    """The number of frames of a stored run."""
    return len(_open_array(_folder(store, run_id), "frames.npy"))


def is_intact(store: str | Path, record: dict) -> bool:
    """Whether a run's arrays are there in full and have the shapes that its record says."""
    folder = Path(store) / "runs" / record["run_id"]
    try:
        frames, voxels = _open_array(folder, "frames.npy"), _open_array(folder, "voxels.npy")
    except InputError as error:
        logger.warning("%s", error)
        return False
    return frames.shape == (record["frames"], record["voxels"]) and voxels.shape == (record["voxels"],)


def clean_unfinished(store: str | Path) -> None:
    """Remove what killed processes of this machine left behind; other machines' and live processes' stay."""
    for path in [*Path(store).glob(f"{_UNFINISHED}@*"), *(Path(store) / "runs").glob(f"{_UNFINISHED}@*")]:
        _, host, pid, _ = path.name.split("@")
        if host == _host() and not _alive(int(pid)):
            logger.info("removing %s, left by a process that ended early", path)
            _remove(path)


def _folder(store: str | Path, run_id: str) -> Path:
    folder = Path(store) / "runs" / run_id
    if not folder.is_dir():
        raise InputError(f"{store} holds no run {run_id}; prepare it, or check the name")
    return folder


def _open_array(folder: Path, name: str) -> NDArray:
    """Map an array of a run into memory, read-only; its values are read when they are used."""
    try:
        return np.load(folder / name, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder / name} is damaged or missing ({error}); prepare that run again") from error


def _save_rows(path: Path, frames: NDArray[np.float16]) -> None:
    """`np.save`, but a chunk at a time: a full disk is then an OSError, and a float32 array needs no copy."""
    header = {"descr": "<f2", "fortran_order": False, "shape": frames.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(frames), _CHUNK_FRAMES):
            file.write(np.ascontiguousarray(frames[start : start + _CHUNK_FRAMES], "<f2").data)


@contextmanager
def _unfinished_beside(target: Path) -> Iterator[Path]:
    """A name beside the target that tells who is writing; removed when the writing fails."""
    path = target.parent / f"{_UNFINISHED}@{_host()}@{os.getpid()}@{uuid.uuid4().hex}"
    try:
        yield path
    except OSError as error:
        _remove(path)
        raise StoreWriteError(
            f"{target} cannot be written ({error.strerror or error}); free space or choose another store"
        ) from error
    except BaseException:
        _remove(path)
        raise


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
                _remove(old)
        else:
            return


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _host() -> str:
    return socket.gethostname().replace("@", "-")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _json(content: dict) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); prepare that run again") from error
