"""Convert the BOLD series of a DICOM folder with dcm2niix, believing neither its exit status nor its TR."""

import gzip
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import pandas as pd

from bundle.dicom.checked import converted, is_number
from bundle.dicom.headers import Image, files_under, is_dicom, read_image
from bundle.dicom.series import IncompleteError, Layout, Series, layout_of, sort_series
from bundle.errors import InputError
from bundle.files import WriteError, remove_path, unfinished_beside, write_json, written_whole

logger = logging.getLogger(__name__)

NUMBERS = {
    "EchoTime", "FlipAngle", "EffectiveEchoSpacing", "TotalReadoutTime", "MagneticFieldStrength", "SliceThickness",
    "SpacingBetweenSlices", "MultibandAccelerationFactor", "ParallelReductionFactorInPlane", "PartialFourier",
}  # fmt: skip
WORDS = {
    "PhaseEncodingDirection": {"i", "i-", "j", "j-", "k", "k-"},
    "PhaseEncodingAxis": {"i", "j", "k"},
    "Manufacturer": {"Siemens", "GE", "Philips", "Canon", "Toshiba", "UIH", "Hitachi", "Mediso", "Bruker"},
}
"""Keys of the sidecar that are kept, with the values they may have: free text could hold a name."""
FIELDS = (
    "dim_info", "dim", "datatype", "bitpix", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b",
    "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
"""Fields of the NIfTI header that are kept; `descrip` and `aux_file` hold times and comments."""


def convert_folder(source: str | Path, out: str | Path, salt: str | Path | None = None, stopped: bool = False) -> None:
    """Write each BOLD series of a DICOM folder as NIfTI with a sidecar, and `summary.tsv` with a row per series.

    Files are `sub-STUDY/func/sub-STUDY_task-rest_acq-SERIES_bold.nii.gz`, STUDY and SERIES being hashes of
    the UIDs. The output folder appears when all is written. Neither it nor a message holds a path of the source, a
    name, a date, a place or free text of the files.

    Args:
        source: folder, searched with all folders in it.
        out: new or empty folder.
        salt: file whose content goes into the hashes, so that only who has it can find a UID's series.
        stopped: your word that scans may have been stopped before all planned volumes were taken.

    Raises:
        InputError: a BOLD series was refused (the others are converted), there is none, or nothing could be done.
    """
    _require_tools()
    source, out = Path(source), Path(out)
    if os.path.lexists(out) and not _is_empty(out):
        raise InputError("the output folder is there already; give a new one")
    images, unreadable = read_folder(source)
    series = sort_series(images, read_salt(salt))
    rows = _written(series, unreadable, out, stopped)
    _refuse(rows)


def _is_empty(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and not any(folder.iterdir())
    except OSError:
        return False


def _require_tools() -> None:
    try:
        import dcm2niix
        import pydicom  # noqa: F401
    except ImportError:
        missing = True
    else:
        missing = not os.access(dcm2niix.bin, os.X_OK)
    if missing:
        raise InputError("reading DICOM needs pydicom and dcm2niix; install them: pip install -e '.[dicom]'")


def read_salt(salt: str | Path | None) -> str:
    """What `bundle.dicom.series.sort_series` is given of a file; "" without one.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return "" if salt is None else Path(salt).read_bytes().hex()
    except OSError as error:
        raise InputError(f"the salt cannot be read ({error.strerror}); give a file") from None


def read_folder(source: Path) -> tuple[list[Image], int]:
    """All images under a folder, and how many files cannot be read or name no series.

    Raises:
        InputError: it is no folder, cannot be read, or holds no DICOM images.
    """
    if not os.path.isdir(source):  # noqa: PTH112 (Path.is_dir raises where a name is too long)
        raise InputError("the source is no folder; give the folder of the DICOM files")
    images: list[Image] = []
    other, unreadable = 0, 0
    try:
        paths = list(files_under(source))
    except OSError as error:
        raise InputError(f"a folder of the source cannot be read ({error.strerror}); give leave to read it") from None
    for path in paths:
        try:
            image = read_image(path) if is_dicom(path) else None
        except OSError:
            unreadable += 1
            continue
        if image is None:
            other += 1
        elif image.series:
            images.append(image)
        else:
            unreadable += 1
    if not images and not unreadable:
        raise InputError(f"the source holds no DICOM images among {other} files; give the folder of the DICOM files")
    logger.info("%d DICOM images; %d other files are left out", len(images), other)
    return images, unreadable


def _written(series: Iterable[Series], unreadable: int, out: Path, stopped: bool) -> list[dict[str, Any]]:
    """Convert all series into a folder that takes its name when all is done; gives the rows of the summary."""
    try:
        with unfinished_beside(out) as folder:
            folder.mkdir(parents=True)
            rows = [_attempt(each, folder, stopped) for each in series]
            if unreadable:
                lost = f"files that cannot be read as DICOM or name no series: {unreadable}"
                rows.append({"series": "", "kind": "unknown", "status": "refused", "reason": lost})
            with written_whole(folder / "summary.tsv") as table:
                pd.DataFrame(rows, columns=["series", "kind", "status", "reason", "volumes", "tr", "file"]).to_csv(
                    table, sep="\t", index=False
                )
            folder.replace(out)
    except WriteError as error:
        reason = getattr(error.__cause__, "strerror", None) or "unknown error"
        problem = f"the output folder cannot be written ({reason}); free space or choose another folder"  # no path
    else:
        return rows
    raise InputError(problem)


def _attempt(series: Series, folder: Path, stopped: bool) -> dict[str, Any]:
    """Convert one series if it is BOLD; its row of the summary."""
    row: dict[str, Any] = {"series": series.name, "kind": series.kind, "status": "not BOLD", "reason": ""}
    if series.kind != "BOLD":
        return row
    name = f"sub-{series.subject}_task-rest_acq-{series.name}_bold"
    target = Path(f"sub-{series.subject}") / "func" / f"{name}.nii.gz"
    try:
        layout = layout_of(series)
        row |= {"volumes": layout.shape[3], "tr": layout.tr}
        work = folder / ".work"
        try:
            image, sidecar = converted(series, layout, work, stopped)
            _write(image, sidecar, layout, folder / target)
        finally:
            remove_path(work)
    except IncompleteError as error:
        logger.warning("series %s %s", series.name, error)
        return row | {"status": "refused", "reason": str(error)}
    logger.info("series %s: %d volumes at %g s", series.name, layout.shape[3], layout.tr)
    return row | {"status": "converted", "file": target.as_posix()}


def _write(image: Any, sidecar: dict[str, Any], layout: Layout, target: Path) -> None:
    """Write NIfTI and sidecar with nothing but what is listed above, and the TR of the DICOM headers."""
    header = nib.Nifti1Header(endianness=image.header.endianness)
    for field in FIELDS:
        header[field] = image.header[field]
    header["scl_slope"], header["scl_inter"] = image.dataobj.slope, image.dataobj.inter  # nibabel clears the header's
    header["pixdim"][4] = layout.tr
    header["magic"], header["vox_offset"] = b"n+1", 352
    raw = image.dataobj.get_unscaled()  # (X, Y, Z, T), on disk
    with (
        written_whole(target) as unfinished,
        unfinished.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,  # no name and no time
    ):
        packed.write(header.binaryblock + bytes(4))
        for t in range(layout.shape[3]):
            packed.write(raw[..., t].tobytes(order="F"))
    kept = {"TaskName": "rest", "RepetitionTime": layout.tr} | kept_keys(sidecar, layout)
    write_json(target.with_name(target.name.removesuffix(".nii.gz") + ".json"), kept)


def kept_keys(sidecar: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The sidecar's keys that are kept: numbers, a few words, and slice times that lie within the TR."""
    kept = {key: sidecar[key] for key in sorted(NUMBERS & set(sidecar)) if is_number(sidecar[key])}
    kept |= {key: sidecar[key] for key in WORDS if str(sidecar.get(key)) in WORDS[key]}
    times = sidecar.get("SliceTiming")
    if (
        isinstance(times, list)
        and len(times) == layout.shape[2]
        and all(is_number(time) and 0 <= time < layout.tr for time in times)
    ):
        kept["SliceTiming"] = times
    return kept


def _refuse(rows: list[dict[str, Any]]) -> None:
    """Raise the sentence that ends a run in which not all was well."""
    done = sum(row["status"] == "converted" for row in rows)
    refused = [
        f"series {row['series']} {row['reason']}" for row in rows if row["status"] == "refused" and row["series"]
    ]
    lost = [row["reason"] for row in rows if not row["series"]]
    if refused or lost:
        counts = f"{len(refused)} of {done + len(refused)} BOLD series refused"
        raise InputError(f"{counts} ({'; '.join(refused + lost)}); summary.tsv lists all")
    if not done:
        kinds = Counter(row["kind"] for row in rows)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise InputError(f"the source holds no BOLD series ({found}); give the folder of a BOLD run")
