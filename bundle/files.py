"""Files written whole or not at all, strict JSON, hashes, versions, and where this bundle lies."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bundle.errors import InputError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
"""Where this bundle lies: the folder that holds `configs/`."""

UNFINISHED = ".unfinished"
"""How the names of files begin that are being written."""


class WriteError(InputError):
    """A file or folder cannot be written (disk full, read-only); every later one would fail too."""


def slug(name: str) -> str:
    """A name with `_` for each character that not every file system keeps; two names may become the same."""
    return re.sub(r"[^A-Za-z0-9+-]", "_", name)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    with written_whole(path) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, whole or not at all; NaN, which JSON lacks, becomes null.

    Raises:
        WriteError: it cannot be written.
        ValueError: a number is infinite.
    """
    write_text(path, json.dumps(_nan_to_null(content), indent=1, allow_nan=False) + "\n")


def _nan_to_null(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _nan_to_null(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_nan_to_null(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed version of each package."""
    return {name: version(name) for name in packages}


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


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a name to write a file under, which takes the target's place when all is written.

    Raises:
        WriteError: it cannot be written; the target stays as it was, and nothing half-written is left.
    """
    with unfinished_beside(target) as unfinished:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(target)


@contextmanager
def unfinished_beside(target: Path) -> Iterator[Path]:
    """A name beside the target, with its suffixes, that tells who is writing; removed when the writing fails.

    Raises:
        WriteError: the writing ends in an `OSError`: the disk is full, read-only or forbidden.
    """
    name = f"{UNFINISHED}@{host_name()}@{os.getpid()}@{uuid.uuid4().hex}{''.join(target.suffixes)}"
    path = target.parent / name
    try:
        yield path
    except OSError as error:
        remove_path(path)
        raise WriteError(
            f"{target} cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error
    except BaseException:
        remove_path(path)
        raise


def clean_unfinished(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder; other machines' and live processes' stays."""
    for path in folder.glob(f"{UNFINISHED}@*"):
        _, host, pid, _ = path.name.split("@")
        if host == host_name() and not is_alive(int(pid)):
            logger.info("removing %s, left by a process that ended early", path)
            remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a file or a folder as far as that is possible; what cannot be removed stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


Stamp = list[int]
"""What tells two versions of a file apart without reading them, see `stamp_of`."""

SETTLED_S = 2.0
"""A file changed less than this long ago may change again without its times telling: some disks count in twos."""


def stamp_of(path: str | Path) -> Stamp | None:
    """Size, times of the last change of content and of anything (ns), and inode of a file; None where there is none.

    Git knows by the same that a file is unchanged. Nobody can set the second time, so that a file that is copied over
    another one with all its times is noticed.
    """
    try:
        found = os.stat(path)  # noqa: PTH116  (called a million times)
    except OSError:  # nor one that can be reached: a loop of links, a name that is too long
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def settled(stamp: Stamp | None) -> bool:
    """Whether a file would have another stamp if it were changed now, as is so of one that is not there."""
    return stamp is None or time.time_ns() - max(stamp[1], stamp[2]) > SETTLED_S * 1e9


def host_name() -> str:
    """This machine's name, fit for a file's name."""
    return socket.gethostname().replace("@", "-")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def metadata() -> dict[str, Any]:
    """What `configs/metadata.json` says of this bundle: name, version, intended use, ..."""
    return json.loads((ROOT / "configs" / "metadata.json").read_text(encoding="utf-8"))


def config_file(name: str) -> Path:
    """Path of a config of this bundle (`"pretrain"`, `"masks/equal"`) or of a JSON file elsewhere.

    Raises:
        InputError: there is no such file.
    """
    path = Path(name) if name.endswith(".json") else ROOT / "configs" / f"{name}.json"
    if not path.is_file():
        known = sorted(str(p.relative_to(ROOT / "configs"))[:-5] for p in (ROOT / "configs").rglob("*.json"))
        raise InputError(f"{path}: no such config; give a path that ends in .json, or one of {', '.join(known)}")
    return path.resolve()
