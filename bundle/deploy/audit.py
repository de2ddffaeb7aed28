"""The audit log of what was scored: a line of JSON per participant and attempt, with hashes and without names.

Each line holds the hash of the one before it, so that a line that was changed, taken out or put in is noticed (a linked
time-stamp: Haber and Stornetta 1991, doi:10.1007/BF00196791). Lines taken from the end are not: keep the hash of the
last one, which `check_log` returns, elsewhere.
"""

import errno
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from bundle.errors import InputError
from bundle.files import WriteError
from bundle.locks import locked

START = "0" * 64
"""Stands for the hash of a line before the first."""


def append_line(log: Path, facts: Mapping[str, Any]) -> None:
    """Add a line with the time (UTC), some facts and the hash of the line before it, and wait until the disk has it.

    Args:
        log: the file, made if absent; several processes may add to it at once.
        facts: JSON; hashes and counts, nothing that names anybody.

    Raises:
        WriteError: it cannot be written; the log is as long as before.
    """
    try:
        with locked(log, patience_s=60.0) as file:
            before = log.read_bytes()
            torn = b"\n" if before and not before.endswith(b"\n") else b""  # a process was killed while it wrote
            line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts, "previous": _last_hash(before)}
            added = torn + json.dumps(line).encode() + b"\n"
            try:
                if os.write(file, added) < len(added):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file)
            except OSError:
                os.ftruncate(file, len(before))
                raise
    except OSError as error:
        raise WriteError(f"{log} cannot be written ({error.strerror}); free space or choose another folder") from error


def check_log(log: str | Path) -> tuple[int, str]:
    """Check that each line is whole and follows the one before it.

    Returns:
        The number of lines, and the hash of the last.

    Raises:
        InputError: it cannot be read, or names the first line that is not as it was written.
    """
    try:
        content = Path(log).read_bytes()
    except OSError as error:
        raise InputError(
            f"{log} cannot be read ({error.strerror}); give the audit.jsonl of an output folder"
        ) from error
    previous = START
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            said = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{log}: line {number} is not whole; a process was killed, or it was changed") from error
        if said != previous:
            raise InputError(f"{log}: line {number} does not follow the line before it; one of the two was changed")
        previous = sha256(line).hexdigest()
    return len(lines), previous


def _last_hash(content: bytes) -> str:
    lines = content.splitlines()
    return sha256(lines[-1]).hexdigest() if lines else START
