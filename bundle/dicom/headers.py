"""Read the header of one DICOM file, without its pixels: what it shows, where it lies, and whether it is whole.

Nothing that names a person leaves this module: UIDs and the patient become hashes, and no message holds a value, a path
or a date of the file.
"""

import hashlib
import logging
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MR_CLASSES = {f"1.2.840.10008.5.1.4.1.1.4{end}" for end in ("", ".1", ".4")}
"""SOP classes of MR images: classic, enhanced, and classic ones that were merged into enhanced ones."""
DIRECTORY_CLASS = "1.2.840.10008.1.3.10"  # DICOMDIR, the contents of a disc

_SIEMENS, _GE, _PHILIPS = "SIEMENS MR HEADER", "GEMS_PARM_01", "Philips Imaging DD 001"
_PHILIPS_SCALE = "Philips MR Imaging DD 001"
_PHASE = {"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY", "VELOCITY MAP", "B0", "B0 MAP"}
_DIFFUSION = {"DIFFUSION", "ADC", "TRACEW", "FA", "TENSOR", "TENSOR_B0"}
_PERFUSION = {"PERFUSION", "ASL", "RELCBF", "TTP", "CBF"}
_DERIVED = {"DERIVED", "MOCO", "T-MAP", "TMAP", "MEAN_MAP", "SUBTRACT", "MPR", "PROJECTION IMAGE"}
_LONG_TRAIN = 8  # echoes per shot; a Philips EPI says EPI only in private tags, which may have been stripped


@dataclass(frozen=True)
class Frame:
    """One slice of an image file.

    Attributes:
        origin: centre of the first pixel, mm, DICOM's LPS world.
        orientation: direction cosines of the rows and of the columns, six numbers.
        time: temporal position, from 1; None where the file has none.
    """

    origin: tuple[float, ...]
    orientation: tuple[float, ...]
    time: int | None


@dataclass(frozen=True)
class Image:
    """One DICOM file of a series.

    Attributes:
        path: the file; never to be shown.
        series: SeriesInstanceUID; never to be shown.
        study: StudyInstanceUID; never to be shown.
        patient: hash of the patient's name and number, to tell two patients apart; never to be shown.
        sop: hash of the SOPInstanceUID.
        problem: why nothing below is known; "" where all is well.
        kind: "BOLD", or what else it shows.
        instance: InstanceNumber.
        tr: RepetitionTime in seconds; 0 where the file has none.
        echo_times: all that occur, ms.
        size: rows and columns of one slice.
        pixel_mm: distance of rows and of columns, mm.
        frames: its slices, as stored; of a mosaic only one, that of the whole mosaic.
        mosaic: how many slices the mosaic holds; 0 where it is none.
        planned: how many volumes the scanner was to take; 0 where the file does not say.
        pixels: where the pixels begin, in bytes from the file's start; 0 where they are compressed.
        dtype: NumPy's name of the stored pixels' type.
        scale: slope and intercept of the stored values, and Philips' own slope, as far as it has them.
        three_d: a 3D acquisition, whose RepetitionTime is not that of a volume.
    """

    path: Path
    series: str
    study: str = ""
    patient: str = ""
    sop: str = ""
    problem: str = ""
    kind: str = ""
    instance: int = 0
    tr: float = 0.0
    echo_times: frozenset[float] = frozenset()
    size: tuple[int, int] = (0, 0)
    pixel_mm: tuple[float, ...] = ()
    frames: tuple[Frame, ...] = ()
    mosaic: int = 0
    planned: int = 0
    pixels: int = 0
    dtype: str = ""
    scale: tuple[frozenset[float], ...] = ()
    three_d: bool = False


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits of the SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def files_under(folder: Path) -> Iterator[Path]:
    """Every file under a folder once, through links to files and folders too; loops of links end."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = Path(entry.path)
                try:
                    status = path.stat()
                except OSError:
                    continue  # a link to nowhere or to itself holds no image
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                if path.is_dir():
                    waiting.append(path)
                elif path.is_file():
                    yield path


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark, raises `OSError` where it cannot be read."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_image(path: Path) -> Image | None:
    """Read one DICOM file's header.

    Args:
        path: a file for which `is_dicom` is true.

    Returns:
        What it is. With "problem" where the file is damaged; its "series" is then "" where even that is unknown. None
        for a DICOMDIR, which holds no image.
    """
    from pydicom import dcmread

    image = Image(path, "", problem="has a damaged header")
    with silent():
        try:
            with path.open("rb") as file:
                data = dcmread(file, stop_before_pixels=True)
                if data.file_meta.get("MediaStorageSOPClassUID") == DIRECTORY_CLASS:
                    return None
                image = replace(image, series=str(data.SeriesInstanceUID))
                groups = _functional_groups(data)
                image = replace(image, **_identity(data), kind=_kind(data, groups))
                if image.kind != "BOLD":  # nothing else of it matters, and it may lack much
                    return replace(image, problem="")
                return replace(image, **_content(data, groups, file))
        except Exception:  # noqa: BLE001 (pydicom raises anything on damaged bytes, and quotes them)
            return image


@contextmanager
def silent() -> Iterator[None]:
    """Keep pydicom from warning, since its warnings quote values."""
    from pydicom import config

    logger = logging.getLogger("pydicom")
    was = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was


def _identity(data: Any) -> dict[str, Any]:
    person = f"{data.get('PatientID')}|{data.get('PatientName')}"
    return {
        "study": str(data.StudyInstanceUID),
        "patient": short_hash(person),
        "sop": short_hash(str(data.SOPInstanceUID)),
        "instance": int(data.get("InstanceNumber") or 0),
    }


def _content(data: Any, groups: list[Any], file: BinaryIO) -> dict[str, Any]:
    """What `Image` holds of a BOLD image; raises what pydicom raises on damaged values."""
    rows, columns, count = int(data.Rows), int(data.Columns), int(data.get("NumberOfFrames") or 1)
    start, whole = _pixels(data, file, rows * columns * count)
    mosaic = _mosaic(data)
    across = math.ceil(math.sqrt(mosaic)) or 1  # tiles in a row of the mosaic
    spacings = set(_each(groups, "PixelMeasuresSequence", "PixelSpacing")) or {_values(data, "PixelSpacing")}
    echoes = _numbers(data, groups, "MREchoSequence", "EffectiveEchoTime") or _values(data, "EchoTime")
    times = _numbers(data, groups, "MRTimingAndRelatedParametersSequence", "RepetitionTime")
    if [len(spacing) for spacing in spacings] != [2] or len(times) > 1:
        raise ValueError("no one spacing and repetition time")
    if min(rows, columns, count) < 1 or int(data.BitsAllocated) != 16:
        raise ValueError("no pixels of 16 bits")
    burned = "has text burned into its pixels" if data.get("BurnedInAnnotation") == "YES" else ""
    return {
        "problem": burned if whole else "is truncated or damaged",
        "tr": round(max(times, default=0.0) / 1000, 5),  # some scanners write rounding errors
        "echo_times": frozenset(round(time, 2) for time in echoes),
        "size": (rows // across, columns // across),
        "pixel_mm": tuple(round(size, 4) for size in spacings.pop()),
        "frames": _frames(data, groups),
        "mosaic": mosaic,
        "planned": _planned(data),
        "pixels": start,
        "dtype": f"{'<' if data.original_encoding[1] else '>'}{'i' if data.get('PixelRepresentation') else 'u'}2",
        "scale": (
            *(
                frozenset(_numbers(data, groups, "PixelValueTransformationSequence", name))
                for name in ("RescaleSlope", "RescaleIntercept")
            ),
            frozenset(_private(data, 0x2005, _PHILIPS_SCALE, 0x0E)),
        ),
        "three_d": data.get("MRAcquisitionType") == "3D",
    }


def _functional_groups(data: Any) -> list[Any]:
    """The shared group and then each frame's own, of an enhanced image; empty for a classic one."""
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])
    return shared + list(data.get("PerFrameFunctionalGroupsSequence") or [])


def _each(groups: list[Any], sequence: str, name: str) -> list[tuple[float, ...]]:
    """The numbers of one attribute in each group that has it."""
    items = [group.get(sequence) for group in groups]
    return [_values(item[0], name) for item in items if item and item[0].get(name) is not None]


def _values(data: Any, name: str) -> tuple[float, ...]:
    """An attribute's numbers; none where it is missing or empty."""
    value = data.get(name)
    if value is None or value == "":
        return ()
    values = tuple(float(number) for number in (value if hasattr(value, "__iter__") else [value]))
    if not np.isfinite(values).all():
        raise ValueError("not a finite number")
    return values


def _numbers(data: Any, groups: list[Any], sequence: str, name: str) -> set[float]:
    """All values of an attribute: of the functional groups, else of the image itself."""
    found = {number for values in _each(groups, sequence, name) for number in values}
    return found or set(_values(data, name))


def _words(data: Any, groups: list[Any]) -> tuple[set[str], set[str]]:
    """Capital words that say what the image shows, and the first words of the image types."""
    types = [list(data.get("ImageType") or [])]
    components = [data.get("ComplexImageComponent"), data.get("AcquisitionContrast")]
    for group in groups:
        for item in group.get("MRImageFrameTypeSequence") or []:
            types.append(list(item.get("FrameType") or []))
            components += [item.get("ComplexImageComponent"), item.get("AcquisitionContrast")]
    words = {str(word).upper() for words in types for word in words[2:]}
    words |= {str(word).upper() for word in components if word and str(word).upper() != "MIXED"}
    return words, {str(words[0]).upper() for words in types if words}


def _kind(data: Any, groups: list[Any]) -> str:
    """What an image shows: "BOLD", or the first thing that speaks against it."""
    if data.get("SOPClassUID") not in MR_CLASSES or data.get("Modality") != "MR":
        return "not MR"
    words, first = _words(data, groups)
    sequence = str(data.get("SequenceName") or data.get("PulseSequenceName") or "").lower()
    scanning = {str(word).upper() for word in _list(data.get("ScanningSequence"))}
    if "LOCALIZER" in words:
        return "localiser"
    if words & _PHASE or (_private(data, 0x43, _GE, 0x2F) or [0])[0] in (1, 2, 3):
        return "phase"
    if words & _DIFFUSION or "ep_b" in sequence or _b_values(data, groups):
        return "diffusion"
    if words & _PERFUSION:
        return "perfusion"
    if (words | first) & _DERIVED:
        return "derived"
    if not _is_epi(data, scanning):
        return "not EPI"
    if "SE" in scanning or "epse" in sequence or data.get("EchoPulseSequence") == "SPIN":
        return "spin echo"
    return "BOLD"


def _is_epi(data: Any, scanning: set[str]) -> bool:
    if "EP" in scanning or data.get("EchoPlanarPulseSequence") == "YES":
        return True
    if "PHILIPS" not in str(data.get("Manufacturer")).upper():
        return False
    factor = (_private(data, 0x2001, _PHILIPS, 0x13) or [0])[0]  # a Philips EPI says GR, and this
    return factor > 1 or max(_values(data, "EchoTrainLength"), default=0) >= _LONG_TRAIN


def _b_values(data: Any, groups: list[Any]) -> bool:
    """Whether any b-value is above 0: the standard's, or that of Siemens or Philips."""
    found = [number for values in _each(groups, "MRDiffusionSequence", "DiffusionBValue") for number in values]
    found += _values(data, "DiffusionBValue")
    found += _private(data, 0x19, _SIEMENS, 0x0C)[:1]
    found += _private(data, 0x2001, _PHILIPS, 0x03)[:1]
    return any(number > 0 for number in found)


def _list(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _private(data: Any, group: int, creator: str, element: int) -> list[float]:
    """Numbers of a private element; none where it is missing or not readable as numbers."""
    try:
        value = data.private_block(group, creator)[element].value
        if isinstance(value, bytes):  # of unknown type
            return []
        return [float(number) for number in ([value] if isinstance(value, str | int | float) else value)]
    except (KeyError, TypeError, ValueError):
        return []


def _mosaic(data: Any) -> int:
    """How many slices a Siemens mosaic holds; 0 where the image is none, `ValueError` where it does not say."""
    if "MOSAIC" not in {str(word).upper() for word in _list(data.get("ImageType"))}:
        return 0
    count = int((_private(data, 0x19, _SIEMENS, 0x0A) or [0])[0])
    if count < 1:
        raise ValueError("a mosaic without its number of slices")
    return count


def _planned(data: Any) -> int:
    """How many volumes the scanner was to take: by the standard, else by the protocol of a Siemens scanner."""
    if planned := int(data.get("NumberOfTemporalPositions") or 0):
        return planned
    protocol = data.get((0x29, 0x1020))  # CSA series header
    text = protocol.value if protocol is not None and isinstance(protocol.value, bytes) else b""
    found = re.search(rb"\blRepetitions\s*=\s*(\d{1,6})\b", text)
    return int(found[1]) + 1 if found else 0


def _frames(data: Any, groups: list[Any]) -> tuple[Frame, ...]:
    """Where and when each slice is."""
    if not groups:
        time = data.get("TemporalPositionIdentifier")
        origin, orientation = _values(data, "ImagePositionPatient"), _values(data, "ImageOrientationPatient")
        return (_checked(origin, orientation, None if time in (None, "") else int(time)),)
    shared = data.get("SharedFunctionalGroupsSequence") or [{}]
    frames = []
    for group in data.PerFrameFunctionalGroupsSequence:
        own = [group, shared[0]]
        origin = _each(own, "PlanePositionSequence", "ImagePositionPatient")[0]
        orientation = _each(own, "PlaneOrientationSequence", "ImageOrientationPatient")[0]
        times = _each(own, "FrameContentSequence", "TemporalPositionIndex")
        frames.append(_checked(origin, orientation, int(times[0][0]) if times else None))
    if len(frames) != int(data.NumberOfFrames):
        raise ValueError("another number of frames than the header says")
    return tuple(frames)


def _checked(origin: tuple[float, ...], orientation: tuple[float, ...], time: int | None) -> Frame:
    if len(origin) != 3 or len(orientation) != 6:
        raise ValueError("no place in space")
    if abs(np.reshape(orientation, (2, 3)) @ np.reshape(orientation, (2, 3)).T - np.eye(2)).max() > 0.01:
        raise ValueError("rows and columns are not at right angles")
    return Frame(origin, orientation, time)


def _pixels(data: Any, file: BinaryIO, count: int) -> tuple[int, bool]:
    """Where uncompressed pixels begin (0: compressed), and whether all of them are there.

    Args:
        data: the header.
        file: at the first byte of the pixels' element, where pydicom stops.
        count: how many pixels of 16 bits there should be.
    """
    implicit, little = data.original_encoding
    order = "<" if little else ">"
    head = file.read(8 if implicit else 12)
    if len(head) < (8 if implicit else 12) or struct.unpack(order + "HH", head[:4]) != (0x7FE0, 0x10):
        return 0, False
    (length,) = struct.unpack(order + "I", head[-4:])
    start, end = file.tell(), os.fstat(file.fileno()).st_size
    if length != 0xFFFFFFFF:
        return start, 2 * count == length <= end - start
    while (item := file.read(8)) and len(item) == 8:  # fragments of compressed pixels, up to their end mark
        group, element, length = struct.unpack("<HHI", item)
        if (group, element) == (0xFFFE, 0xE0DD):
            return 0, True
        if (group, element) != (0xFFFE, 0xE000) or file.tell() + length > end:
            return 0, False
        file.seek(length, os.SEEK_CUR)
    return 0, False
