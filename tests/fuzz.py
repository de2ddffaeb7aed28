"""Broken files at the doors: `python -m tests.fuzz --minutes 30` from the repository's root.

Each case is drawn from the seed and its number alone, so that what was found comes again by `--case NUMBER`. A door may
take a broken file, or refuse it in one sentence. All else is found: any other error, a sentence that says
"unexpectedly", more than 4 GiB of memory, more than two minutes of computing, something half-written, a person's name.
"""

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from small_dicom import SECRETS, head, save_series, slices_of
from small_runs import coarse_brain, coarse_signal, run_of, save_bold, save_mask

from bundle.dicom.convert import convert_folder
from bundle.errors import InputError
from bundle.files import UNFINISHED
from bundle.preparation.bold import open_bold
from bundle.preparation.chain import load_preparation
from bundle.preparation.frames import frame_reader
from bundle.preparation.prepare import prepare
from bundle.preparation.register import _motion

GIB = 2**30
SECONDS = 120
NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31), 2**62, 1e-30, 1e30, -1e30)
WORDS = (None, True, "2.0", "2,0", [], {}, [2.0], {"s": 2}, float("nan"), float("inf"), -1, 0, 1e-9, 1e9, "", "2" * 400)


class FoundError(Exception):
    """A door did what it must not do."""


def broken_bytes(content: bytes, draw: np.random.Generator, within: int | None = None) -> bytes:
    """Flip, cut, double or overwrite some bytes, all of them, or those before `within`."""
    changed = bytearray(content)
    end = min(within or len(changed), len(changed))
    match draw.integers(5):
        case 0:
            for place in draw.integers(0, end, draw.integers(1, 9)):
                changed[place] = draw.integers(256)
        case 1:
            for place in draw.integers(0, end, draw.integers(1, 4)):
                changed[place] ^= 1 << int(draw.integers(8))
        case 2:
            del changed[draw.integers(0, len(changed)) :]
        case 3:
            start = int(draw.integers(0, end))
            changed[start : start + int(draw.integers(1, 64))] = draw.bytes(int(draw.integers(0, 64)))
        case _:
            start = int(draw.integers(0, end))
            changed[start:start] = changed[: int(draw.integers(1, 512))]
    return bytes(changed)


def broken_header(content: bytes, draw: np.random.Generator) -> bytes:
    """Overwrite some fields of a NIfTI header, of either version and byte order."""
    kind = nib.Nifti2Header if draw.random() < 0.3 else nib.Nifti1Header
    image = nib.Nifti1Image.from_bytes(content)
    header = kind.from_header(image.header) if kind is nib.Nifti2Header else image.header.copy()
    if draw.random() < 0.2:
        header = header.as_byteswapped()
    fields = header._structarr
    for _ in range(draw.integers(1, 4)):
        name = str(draw.choice(fields.dtype.names))
        flat = np.atleast_1d(fields[name]).reshape(-1)
        if flat.dtype.kind in "SV":
            value: object = draw.bytes(flat.dtype.itemsize)
        elif flat.dtype.kind == "f":
            value = draw.choice([*NUMBERS, np.nan, np.inf, -np.inf])
        else:
            limits = np.iinfo(flat.dtype)
            value = int(
                np.clip(float(draw.choice(NUMBERS)), limits.min, limits.max - (flat.dtype.itemsize == 8) * 1024)
            )
        place = int(draw.integers(len(flat)))
        if fields[name].shape:
            fields[name][place] = value
        else:
            fields[name] = value
    data = content[352:]
    return bytes(header.binaryblock) + bytes(4) + data


def draw_nifti(folder: Path, draw: np.random.Generator, native: bool) -> dict:
    """A run with something broken: header, data, compression, sidecar, mask or confounds."""
    folder.mkdir(parents=True)
    path = folder / str(draw.choice(["run.nii", "run.nii.gz"]))
    plain = folder / "plain.nii"
    save_bold(plain, SIGNAL, sform=1 if native else 4, qform=int(draw.integers(2)) if native else 0)
    content = plain.read_bytes()
    plain.unlink()
    run = run_of(path)
    what = draw.choice(["header", "header", "bytes", "values", "gzip", "sidecar", "mask", "confounds"])
    if what == "header":
        content = broken_header(content, draw)
    elif what == "bytes":
        content = broken_bytes(content, draw, 400 if draw.random() < 0.5 else None)
    elif what == "values":
        values = SIGNAL.copy()
        values[tuple(draw.integers(0, n) for n in values.shape)] = draw.choice([np.nan, np.inf, 3e38, -3e38, 1e-40])
        values *= draw.choice([1.0, 0.0, 1e30, 1e-30, np.nan])
        content = content[:352] + values.astype("<f4").tobytes(order="F")
    elif what == "sidecar":
        text = json.dumps({"RepetitionTime": WORDS[draw.integers(len(WORDS))]}).encode()
        text = [text, broken_bytes(text, draw), b"[" * 100_000, b"\xff\xfe" + text, b""][draw.integers(5)]
        (folder / "run.json").write_bytes(text)
    elif what == "mask" and not native:
        run["mask"] = save_mask(folder / "mask.nii", coarse_brain())
        mask = run["mask"].read_bytes()
        run["mask"].write_bytes(broken_header(mask, draw) if draw.random() < 0.7 else broken_bytes(mask, draw))
    elif what == "confounds" and not native:
        run["confounds"] = folder / "confounds.tsv"
        table = "\n".join(["framewise_displacement\ta", *(f"{draw.random()}\t{draw.random()}" for _ in range(30))])
        run["confounds"].write_bytes(broken_bytes(table.encode(), draw))
    packed = gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content
    path.write_bytes(broken_bytes(packed, draw) if what == "gzip" else packed)
    return run


def one_sentence(said: str) -> None:
    if "\n" in said or "unexpectedly" in said or not 20 < len(said) < 2000:
        raise FoundError(f"not one sentence: {said[:300]!r}")


def nifti_door(folder: Path, draw: np.random.Generator) -> str:
    """`prepare` of one run in MNI space."""
    run = draw_nifti(folder / "in", draw, native=False)
    preparation = CLEANED if run["confounds"] else PLAIN
    (row,) = prepare([run], folder / "store", preparation)["rows"]
    if row["status"] == "failed":
        one_sentence(row["reason"])
    elif not np.isfinite([row["mean"], row["sd"], row["mni_overlap"]]).all():
        raise FoundError(f"prepared, but not finite: {row['mean']}, {row['sd']}")
    return row["status"]


def native_door(folder: Path, draw: np.random.Generator) -> str:
    """A run to be registered, as far as its motion; now and then all the way."""
    run = draw_nifti(folder / "in", draw, native=True)
    if draw.random() < 0.003:
        (row,) = prepare([run], folder / "store", REGISTERED)["rows"]
        if row["status"] == "failed":
            one_sentence(row["reason"])
        return row["status"]
    bold = open_bold(run["bold"], native=True)
    motion, mean = _motion(bold, frame_reader(bold))
    if not (np.isfinite(motion).all() and np.isfinite(mean).all()):
        raise FoundError("motion that is not finite")
    return "aligned"


def dicom_door(folder: Path, draw: np.random.Generator) -> str:
    """`convert_folder` of a series, some of whose files are broken, gone, doubled, or say something odd."""
    folder.mkdir(parents=True)
    source = save_series(
        folder / "Zyzzyva^Quux", slices_of(HEAD, vendor=str(draw.choice(["GE", "Philips"]))), odd(draw)
    )
    files = sorted(source.iterdir())
    for _ in range(draw.integers(0, 3)):
        file = files[draw.integers(len(files))]
        match draw.integers(4):
            case 0:
                file.unlink(missing_ok=True)
            case 1 if file.is_file():
                file.write_bytes(broken_bytes(file.read_bytes(), draw, 1500))
            case 2 if file.is_file():
                file.with_suffix(".copy").write_bytes(file.read_bytes())
            case _:
                with contextlib.suppress(OSError):
                    (source / "loop").symlink_to(source, target_is_directory=True)
    said, caught = io.StringIO(), None
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        convert_folder(source, folder / "out")
    except InputError as error:
        caught = str(error)
    finally:
        logging.getLogger().removeHandler(handler)
    texts = said.getvalue() + (caught or "")
    for path in folder.rglob("*"):
        if source not in path.parents and path != source:
            if path.name.startswith(UNFINISHED):
                raise FoundError(f"left half-written: {path.name}")
            texts += path.relative_to(folder).as_posix()
            texts += path.read_bytes().decode("latin-1") if path.is_file() else ""
    if leaked := [secret for secret in SECRETS if secret in texts]:
        raise FoundError(f"says {leaked}")
    if caught:
        one_sentence(caught)
        return "refused"
    return "converted"


def odd(draw: np.random.Generator):
    """A change of one element, in one file or in all."""
    name = str(draw.choice(
        ["RepetitionTime", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
         "InstanceNumber", "TemporalPositionIdentifier", "NumberOfTemporalPositions", "BitsAllocated", "BitsStored",
         "SamplesPerPixel", "PixelRepresentation", "ImageType", "SliceThickness", "SeriesInstanceUID", "PixelData",
         "EchoTime", "AcquisitionTime", "Manufacturer", "SliceLocation", "AcquisitionNumber", "SOPClassUID"]
    ))  # fmt: skip
    values = ["", "0", "-1", "1e400", "nan", "x" * 70, "9" * 12, "1\\2", "Zyzzyva^Quux", "1.5", "\\", "65535"]
    value, at = str(draw.choice(values)), int(draw.integers(-1, 45))
    gone = draw.random() < 0.3

    def change(number: int, item) -> None:
        if at in (-1, number) and name in item:
            item["PixelData"].VR = "OW"  # which cannot be guessed any more where BitsAllocated is gone
            if gone:
                del item[name]
                return
            kind = item[name].VR
            if name == "PixelData":
                item[name].value = item[name].value[: 2 * int(draw.integers(0, 900))]
            elif kind in ("US", "SS"):
                item[name].value = int(float(value)) % 65536 if value in ("0", "65535", "1.5") else 3
            else:
                with contextlib.suppress(ValueError, OverflowError):
                    item[name].value = value.split("\\") if "\\" in value else value

    return change


DOORS = {"nifti": nifti_door, "native": native_door, "dicom": dicom_door}
SHARE = {"nifti": 0.6, "native": 0.3, "dicom": 0.1}


def one_case(seed: int, number: int) -> tuple[str, str, str | None]:
    """Door, outcome, and what was found in one case."""
    draw = np.random.default_rng([seed, number])
    door = str(draw.choice(list(SHARE), p=list(SHARE.values())))
    with tempfile.TemporaryDirectory() as folder:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, resource.RLIM_INFINITY))
        try:
            return door, DOORS[door](Path(folder) / "case", draw), None
        except InputError as error:
            try:
                one_sentence(str(error))
            except FoundError as found:
                return door, "found", str(found)
            return door, "refused", None
        except Exception as error:  # noqa: BLE001 (that is what it is for)
            places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            return door, "found", f"{type(error).__name__}: {str(error)[:300]} ({' < '.join(places[::-1][:4])})"


def _too_long(*_: object) -> None:
    raise TimeoutError("more than two minutes of computing")


def main() -> None:
    """Run for some time, or one case, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    asked = parser.parse_args()
    os.nice(19)
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.CRITICAL if asked.case is None else logging.INFO)
    signal.signal(signal.SIGXCPU, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB))
    outcomes: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    end, number = time.monotonic() + 60 * asked.minutes, asked.case or 0
    while time.monotonic() < end:
        door, outcome, what = one_case(asked.seed, number)
        outcomes[f"{door} {outcome}"] += 1
        if what:
            found.setdefault(what, []).append(number)
            print(f"case {number}, {door}: {what}", flush=True)  # noqa: T201
        number += 1
        if asked.case is not None:
            break
        if number % 20 == 0:
            print(f"{number} cases: {dict(sorted(outcomes.items()))}", flush=True)  # noqa: T201
    print(f"{sum(outcomes.values())} cases of seed {asked.seed}: {dict(sorted(outcomes.items()))}; found {len(found)}")  # noqa: T201
    sys.exit(bool(found))


SIGNAL = coarse_signal()
HEAD = head(volumes=9, slices=5)
PLAIN = load_preparation()
CLEANED = load_preparation(confounds="table", max_fd=0.9)
REGISTERED = load_preparation(register="affine")

if __name__ == "__main__":
    main()
