"""Which layout a source has, and its runs."""

import glob
import logging
import re
from pathlib import Path
from typing import get_args

from bundle.errors import InputError
from bundle.preparation.sources.adhd200 import ATHENA, NILEARN, from_adhd200, from_nilearn_adhd
from bundle.preparation.sources.bids import bold_files, from_bids
from bundle.preparation.sources.files import from_files
from bundle.preparation.sources.participants import Labels, Run, files_below
from bundle.preparation.sources.table import from_table

logger = logging.getLogger(__name__)

LAYOUTS = ("auto", "bids", "adhd200", "nilearn-adhd", "files", "table")
_NIFTI = (".nii", ".nii.gz", ".hdr")


def find_runs(
    source: str | Path,
    labels: Labels = "required",
    layout: str = "auto",
    participants: str | Path | None = None,
    tr: float | None = None,
    space: str | None = None,
    native: bool = False,
) -> list[Run]:
    """List the runs of a source, whatever its layout.

    Args:
        source: a folder, a glob such as "data/**/*_bold.nii.gz", one NIfTI file, or a .csv or .tsv table of runs.
        labels: "required" or "optional" (see `from_bids`).
        layout: one of `LAYOUTS`; "auto" looks at the names and logs what it chose.
        participants: table of participants, where it is not beside the runs.
        tr: repetition time of every run in seconds, over what the files say.
        space: the user's word that every run is in this space ("MNI...").
        native: of a BIDS folder, take the raw runs, which are to be registered, instead of those in MNI space.

    Returns:
        Runs (see the package).

    Raises:
        InputError: no such source or layout, several layouts at once, no runs, or tables that cannot be used.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if labels not in get_args(Labels):
        raise InputError(f"labels must be {' or '.join(get_args(Labels))}, not {labels!r}")
    paths, root = _files(source)
    if layout == "auto":
        layout = _layout_of(paths, root, source)
        logger.info("%s has the layout %s: %s", source, layout, _MEANING[layout])
    if layout == "table":
        runs = from_table(source, labels)
    elif layout == "bids":
        runs = from_bids(source, participants, labels, native)
    else:
        adapter = {"adhd200": from_adhd200, "nilearn-adhd": from_nilearn_adhd, "files": from_files}[layout]
        runs = adapter(paths, root, participants, labels)
    if not runs:
        raise InputError(f"{source} holds no runs of the layout {layout}; check the path, or give another --layout")
    given = {key: value for key, value in (("tr", tr), ("space", space)) if value is not None}
    return [run | given for run in runs]


_MEANING = {
    "table": "a table with one row per run",
    "bids": "BIDS, sub-*/[ses-*/]func/*_space-MNI*_desc-preproc_bold, or *_bold if it is to be registered",
    "adhd200": "ADHD-200 of the Athena pipeline, s[f]nwmrda<ID>_session_<N>_rest_<M>",
    "nilearn-adhd": "nilearn's ADHD sample, <ID>_rest_tshift_RPI_voreg_mni",
    "files": "NIfTI files, one run each",
}


def _files(source: str | Path) -> tuple[list[Path], Path]:
    """The NIfTI files of a source and the folder that they were looked for in."""
    path = Path(source)
    if path.is_dir():
        return [file for file in files_below(path) if file.name.endswith(_NIFTI)], path
    if path.is_file():
        return ([path] if path.name.endswith(_NIFTI) else []), path.parent
    if not glob.has_magic(str(source)):
        raise InputError(f"{source} does not exist; give a folder, a glob in quotes, a NIfTI file or a table")
    found = [Path(name) for name in glob.glob(str(source), recursive=True)]  # noqa: PTH207  (absolute patterns too)
    plain = re.split(r"[*?\[]", str(source), maxsplit=1)[0]
    root = Path(plain) if plain.endswith("/") else Path(plain).parent
    return sorted(file for file in found if file.name.endswith(_NIFTI)), root


def _layout_of(paths: list[Path], root: Path, source: str | Path) -> str:
    path = Path(source)
    if path.is_file() and not path.name.endswith(_NIFTI):
        return "table"
    if not paths:
        raise InputError(f"{source} holds no .nii, .nii.gz or .hdr file; check the path")
    signs = {
        "bids": path.is_dir() and bool(bold_files(root)),
        "adhd200": any(ATHENA.fullmatch(file.name) for file in paths),
        "nilearn-adhd": any(NILEARN.fullmatch(file.name) for file in paths),
    }
    found = [name for name, seen in signs.items() if seen]
    if len(found) > 1:
        raise InputError(f"{source} looks like {' and '.join(found)}; say which with --layout")
    return found[0] if found else "files"
