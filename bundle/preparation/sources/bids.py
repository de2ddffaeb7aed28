"""BIDS derivatives, as fMRIPrep writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nilearn.interfaces.bids import get_bids_files

from bundle.errors import InputError
from bundle.preparation.bids_names import entities
from bundle.preparation.sources.participants import (
    Labels,
    Run,
    beside,
    find_participants,
    refuse_duplicate_runs,
    run_id_of,
    with_participant,
)


def from_bids(
    derivatives: str | Path,
    participants: str | Path | None = None,
    labels: Labels = "required",
    native: bool = False,
) -> list[Run]:
    """List the MNI-space preprocessed BOLD runs of a derivatives folder, or the raw runs of a BIDS folder.

    Takes `sub-*[/ses-*]/func/*_space-MNI*_desc-preproc_bold.nii[.gz]`, each with the `_desc-brain_mask` and the
    `_desc-confounds_timeseries.tsv` beside it if there are any.

    Args:
        derivatives: the folder that holds the sub-* folders.
        participants: participants.tsv; by default the one in `derivatives`, else in the nearest folder above, up to
            two levels (as for a dataset's derivatives/fmriprep).
        labels: "required" marks a run whose participant has no row, or no site, with a "problem"; "optional" keeps it,
            as pretraining and inference need neither.
        native: take `sub-*[/ses-*]/func/*_bold.nii[.gz]` without space or desc in its name instead, which is to be
            registered. Phase images are left out; of several echoes each has a "problem", as they must be combined.

    Returns:
        Runs sorted by run id (see the package).

    Raises:
        InputError: no folder, no runs, two files for one run, or a table that cannot be used.
    """
    derivatives = Path(derivatives)
    if not derivatives.is_dir():
        raise InputError(f"{derivatives} is not a folder; give the derivatives folder that holds the sub-* folders")
    paths = [path for path in bold_files(derivatives) if is_wanted(path, native)]
    return runs_of(paths, derivatives, participants, labels, native)


def runs_of(
    paths: Sequence[Path],
    derivatives: Path,
    participants: str | Path | None = None,
    labels: Labels = "required",
    native: bool = False,
) -> list[Run]:
    """The runs of some of a derivatives folder's files; see `from_bids`, which takes all."""
    if not paths and native:
        raise InputError(f"{derivatives} holds no raw sub-*/[ses-*/]func/*_bold.nii[.gz] to register; check the path")
    if not paths:
        raise InputError(
            f"{derivatives} holds no sub-*/[ses-*/]func/*_space-MNI*_desc-preproc_bold.nii[.gz]; check the path, or "
            "that preprocessing wrote an MNI output space"
        )
    table = find_participants(derivatives, participants, labels)
    return refuse_duplicate_runs([_run(path, table, labels) for path in paths], derivatives)


def files_by_participant(derivatives: Path, native: bool = False) -> dict[str, list[Path]]:
    """The files that `from_bids` takes, by their participant's folder, sub-*; of some there may be none."""
    found: dict[str, list[Path]] = {path.name: [] for path in sorted(derivatives.glob("sub-*")) if path.is_dir()}
    for path in bold_files(derivatives):
        if is_wanted(path, native):
            found[path.relative_to(derivatives).parts[0]].append(path)
    return found


def bold_files(folder: Path) -> list[Path]:
    """Every `sub-*[/ses-*]/func/sub-*_bold.nii[.gz]` of a BIDS folder, raw or derived, by nilearn."""
    names = get_bids_files(folder, file_tag="bold", file_type="nii*", modality_folder="func")
    return [Path(name) for name in names if name.endswith((".nii", ".nii.gz"))]


def is_wanted(path: Path, native: bool) -> bool:
    """Whether `from_bids` takes a file, by its name."""
    parts = entities(path)
    if native:
        return not {"space", "desc"} & set(parts) and parts.get("part", "mag") == "mag"
    return parts.get("space", "").startswith("MNI") and parts.get("desc") == "preproc"


def _run(path: Path, participants: dict[str, dict[str, Any]], labels: Labels) -> Run:
    parts = entities(path)
    folder = next(part for part in reversed(path.parts[:-1]) if part.startswith("sub-"))
    if f"sub-{parts.get('sub')}" != folder:
        raise InputError(
            f"{path} does not say its subject as BIDS does (sub-, letters and digits, as its folder {folder}); rename "
            "it, or list the runs in a table"
        )
    row = participants.get(parts["sub"])
    run = {
        "run_id": run_id_of(path),
        "participant_id": f"sub-{parts['sub']}",
        "bold": path,
        **beside(path),
        "tr": None,
        "space": None,
    }
    if "echo" in parts and "desc" not in parts:
        run["problem"] = f"{path} is one of several echoes, which --register does not combine; use fMRIPrep"
    problem = None if row is not None else f"sub-{parts['sub']} has no row in participants.tsv"
    return with_participant(run, row or {}, labels, problem)
