"""A folder or a glob of NIfTI files, named anyhow."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from bundle.preparation.bids_names import entities, stem
from bundle.preparation.sources.participants import (
    Labels,
    Run,
    beside,
    find_participants,
    refuse_duplicate_runs,
    run_id_of,
    with_participant,
)

logger = logging.getLogger(__name__)


def from_files(
    paths: Sequence[Path], root: Path, participants: str | Path | None = None, labels: Labels = "required"
) -> list[Run]:
    """List NIfTI files as runs, one participant per BIDS sub entity, else per file.

    Files whose names say that they are masks, labels or references are left out, and their number is logged. The
    brain mask and the confounds that fMRIPrep has written beside a run are used.

    Args:
        paths: the files.
        root: the folder they were looked for in: run ids are paths below it.
        participants: table whose participant_id is the sub entity or the file's run id; by default participants.tsv
            in `root` or up to two folders above.
        labels: see `from_bids`.

    Returns:
        Runs sorted by run id (see the package).

    Raises:
        InputError: labels are required and there is no table, or it cannot be used.
    """
    kept = [path for path in paths if not re.search(r"(mask|dseg|probseg|boldref|T1w|T2w|anat)$", stem(path))]
    if len(kept) < len(paths):
        logger.info("%s: %d files named like masks or anatomy are left out", root, len(paths) - len(kept))
    table = find_participants(root, participants, labels)
    runs = []
    for path in kept:
        named = "sub" in entities(path)
        run_id = run_id_of(path) if named else _name_below(path, root)
        participant = f"sub-{entities(path)['sub']}" if named else run_id
        row = table.get(participant.removeprefix("sub-"))
        run = {
            "run_id": run_id, "participant_id": participant, "bold": path, **beside(path), "tr": None,
            "space": None,
        }  # fmt: skip
        problem = None if row is not None else f"{participant} has no row in the participants' table"
        runs.append(with_participant(run, row or {}, labels, problem))
    if unnamed := [run["run_id"] for run in runs if run["run_id"] == run["participant_id"]]:
        logger.warning(
            "%s: %d files, such as %s, name no subject (sub-...), so each is taken as a participant of its own; runs "
            "of one subject would end up in several sets: list these in a table", root, len(unnamed), unnamed[0],
        )  # fmt: skip
    return refuse_duplicate_runs(runs, root)


def _name_below(path: Path, root: Path) -> str:
    """`a/b c/rest.nii.gz` below the root as the run id `a_b-c_rest`."""
    name = "_".join([*path.relative_to(root).parts[:-1], stem(path)])
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", name).lstrip(".")
