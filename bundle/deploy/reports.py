"""Write predictions as reports for a hospital's systems: DICOM SR, a page as PDF in DICOM, and FHIR.

All reports are preliminary, and the same input twice gives the same bytes.
"""

import json
import logging
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from bundle.deploy import results_dicom, results_fhir
from bundle.deploy.results import Result, read_results
from bundle.dicom.convert import read_folder, read_salt
from bundle.dicom.series import IncompleteError, Series, layout_of, sort_series
from bundle.errors import InputError
from bundle.files import WriteError, remove_path, slug, write_bytes

logger = logging.getLogger(__name__)

FORMATS = {"sr": "sr.dcm", "pdf": "page.dcm", "fhir": "fhir.json"}
"""And how the names of their files end."""


def write_results(
    predictions: str | Path,
    out: str | Path,
    formats: Sequence[str] = tuple(FORMATS),
    series: str | Path | None = None,
    salt: str | Path | None = None,
    made: str | None = None,
) -> None:
    """Write `OUT/<participant>_sr.dcm`, `_page.dcm` and `_fhir.json`.

    A score and its DICOM series are brought together by the hash of the SeriesInstanceUID that
    `bundle.dicom.convert.convert_folder` puts into the name of a run (acq-SERIES), never by a folder's or a
    participant's name: a report must not get to another patient.

    Args:
        predictions: folder of `predictions.tsv`, or the output of the BIDS App.
        out: folder.
        formats: of `FORMATS`.
        series: DICOM folder; only participants whose series it holds are written. None: everybody, FHIR only.
        salt: the file that was given to the conversion.
        made: when the results were made, ISO 8601 with its offset; by default DICOM has the date and time of the
            series, and FHIR none.

    Raises:
        InputError: nothing could be done; or somebody's reports could not be written, and all others' are.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"--format {unknown[0]}: there is no such format; give some of {', '.join(FORMATS)}")
    _require_tools(formats)
    time = None if made is None else _time(made)
    results = read_results(Path(predictions))
    if series is None and set(formats) - {"fhir"}:
        raise InputError(
            "a DICOM SR or PDF belongs to the series that a score is of, and from NIfTI alone there is none; give "
            "--series FOLDER of the DICOM files, or --format fhir"
        )
    found = {result.participant: [] for result in results} if series is None else _match(results, Path(series), salt)
    chosen = [result for result in results if result.participant in found]
    if len({_place(Path(out), result, "sr") for result in chosen}) < len(chosen):
        raise InputError(f"{predictions}: two participants would have files of the same name; rename one")
    problems = {}
    for result in chosen:
        try:
            _write(result, found[result.participant], Path(out), formats, time)
        except WriteError:
            raise
        except InputError as error:
            problems[result.participant] = str(error)
    logger.info("Wrote the reports of %d participants", len(chosen) - len(problems))
    if problems:
        name, reason = next(iter(problems.items()))
        raise InputError(
            f"{len(problems)} of {len(chosen)} participants have no reports, and the others are done; the first is "
            f"{name}: {reason}"
        )


def _require_tools(formats: Sequence[str]) -> None:
    try:
        if set(formats) - {"fhir"}:
            import highdicom  # noqa: F401
        if "fhir" in formats:
            import fhir.resources  # noqa: F401
    except ImportError as error:
        raise InputError(
            "reports need highdicom and fhir.resources; install them: pip install -e '.[results]'"
        ) from error


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise InputError(
            f"--made must be a date and time with its offset, such as 2026-01-31T14:30:00+01:00, not {text}"
        )
    return time.replace(microsecond=0)


def _match(results: Sequence[Result], folder: Path, salt: str | Path | None) -> dict[str, list[Series]]:
    """The BOLD series of each participant, of those of whom the folder holds any."""
    images, _ = read_folder(folder)
    known = {series.name: series for series in sort_series(images, read_salt(salt)) if series.kind == "BOLD"}
    found = {}
    for result in results:
        named = [re.search(r"(?:^|_)acq-([0-9a-f]{12})(?=_|$)", run_id) for run_id in result.runs]
        names = [match[1] for match in named if match]
        if own := [known[name] for name in dict.fromkeys(names) if name in known]:
            found[result.participant] = own
    if not found:
        raise InputError(
            f"none of the {len(known)} BOLD series is one that was scored; a run's name has to hold acq-SERIES as "
            "`python -m scripts dicom` has written it, with the same --salt"
        )
    return found


def _write(result: Result, series: Sequence[Series], out: Path, formats: Sequence[str], made: datetime | None) -> None:
    """Write one participant's files; those of an earlier call go first, so that none is taken for this one's."""
    places = {name: _place(out, result, name) for name in formats}
    for path in places.values():
        remove_path(path)
    contents: dict[str, bytes] = {}
    if set(formats) - {"fhir"}:
        source = results_dicom.read_source(_checked(result, series), made)
        contents["sr"] = results_dicom.structured_report(result, source)
        contents["pdf"] = results_dicom.page(result, source)
    if "fhir" in formats:
        contents["fhir"] = (json.dumps(results_fhir.bundle(result, made), indent=1) + "\n").encode()
    for name, path in places.items():
        write_bytes(path, contents[name])


def _place(out: Path, result: Result, form: str) -> Path:
    return out / f"{slug(result.participant)}_{FORMATS[form]}"


def _checked(result: Result, series: Sequence[Series]) -> Sequence[Series]:
    """Refuse series that are not whole, not all that were scored, or of several patients or studies."""
    for one in series:
        try:
            layout_of(one)
        except IncompleteError as error:
            raise InputError(f"series {one.name} {error}") from None
    if len(series) != len(result.runs):
        raise InputError(f"{len(result.runs)} runs were scored, and of them the folder holds {len(series)}; give all")
    if len({(image.study, image.patient) for one in series for image in one.images}) > 1:
        raise InputError("its series are of two patients or two studies, and a report belongs to one")
    return series
