"""What `prepare` remembers of files that it has read, so that it need not read half a million of them again.

A run is known by one fingerprint: of the stamps of its files in the source and in the store, of what the user says of
it, and of what its record says of its files. No fingerprint is kept of files so young that they could change without
their stamps telling.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundle.files import Stamp, settled, stamp_of, write_text
from bundle.preparation.bids_names import stem
from bundle.preparation.store import array_files

logger = logging.getLogger(__name__)

IDENTITY = ("source_sha256", "mask_sha256", "confounds_sha256", "tr_in", "space", "parameters_hash")
"""What a record says of the files that it was made from: a run is current where all of it is the same."""
_FILE = ".seen-sources.json"


def source_stamps(run: Mapping[str, Any]) -> list[Stamp | None]:
    """Stamps of every file that decides what a run of `bundle.preparation.sources` is, mask and confounds included."""
    bold = Path(run["bold"])
    start = f"{bold.parent}/{stem(bold)}"  # a string: a path is ten times as slow, half a million times
    beside = [f"{start}{ending}" for ending in (".json", ".hdr", ".img", ".img.gz")]
    return [stamp_of(path) if path else None for path in (bold, *beside, run["mask"], run["confounds"])]


def fingerprint(
    run: Mapping[str, Any], stamps: Sequence[Stamp | None], record: Mapping[str, Any], store: str | Path
) -> str | None:
    """All that a current run is known by without reading its files, its arrays in the store among them.

    Args:
        run: from `bundle.preparation.sources`.
        stamps: `source_stamps` of before its files were read.
        record: what the store says of it.
        store: the store's folder.

    Returns:
        A hash, hexadecimal; None where a file is too young (`bundle.files.settled`).
    """
    stamps = [*stamps, *map(stamp_of, array_files(store, run["run_id"]))]
    if not all(map(settled, stamps)):
        return None
    said = [str(run[key]) for key in ("bold", "mask", "confounds", "tr", "space")]
    known = [record.get(key) for key in IDENTITY]
    return hashlib.sha256(json.dumps([said, stamps, known]).encode()).hexdigest()


def read_seen(store: str | Path) -> dict[str, str]:
    """Fingerprints of the last time by run id; none where there is no such file, or a damaged one."""
    path = Path(store) / _FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError:
        logger.warning("%s is damaged, so all source files are read again", path)
        return {}


def write_seen(store: str | Path, fingerprints: Mapping[str, str | None]) -> None:
    """Keep fingerprints by run id for the next time.

    Raises:
        WriteError: the store cannot be written.
    """
    kept = {run_id: value for run_id, value in fingerprints.items() if value}
    write_text(Path(store) / _FILE, json.dumps(kept) + "\n")
