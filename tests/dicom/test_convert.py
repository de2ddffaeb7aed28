"""The door itself: kinds, names, links, disks that are full, tools that are missing, and what is kept of a sidecar."""

import errno
import gzip
import io
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from small_dicom import NAME, SECRETS, head, save_series, slices_of

from bundle.dicom import convert
from bundle.dicom.convert import convert_folder, kept_keys
from bundle.dicom.headers import files_under, read_image
from bundle.dicom.series import layout_of, sort_series
from bundle.errors import InputError
from scripts.__main__ import main


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole classic series; not to be changed."""
    return save_series(tmp_path_factory.mktemp("good") / "in", slices_of(head(slices=6)))


def ct(item: Dataset) -> None:
    item.SOPClassUID, item.Modality = "1.2.840.10008.5.1.4.1.1.2", "CT"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("not MR", ct),
        ("localiser", lambda item: setattr(item, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])),
        ("phase", lambda item: setattr(item, "ImageType", ["ORIGINAL", "PRIMARY", "P", "ND"])),
        ("phase", lambda item: item.private_block(0x43, "GEMS_PARM_01").add_new(0x2F, "SS", 1)),
        ("phase", lambda item: setattr(item, "ComplexImageComponent", "PHASE")),
        ("phase", lambda item: setattr(item, "ImageType", ["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"])),
        ("diffusion", lambda item: setattr(item, "DiffusionBValue", 1000.0)),
        ("diffusion", lambda item: setattr(item, "SequenceName", "*ep_b0")),
        ("diffusion", lambda item: item.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", 700)),
        ("perfusion", lambda item: setattr(item, "ImageType", ["ORIGINAL", "PRIMARY", "ASL", "NONE"])),
        ("derived", lambda item: setattr(item, "ImageType", ["DERIVED", "PRIMARY", "OTHER"])),
        ("derived", lambda item: setattr(item, "ImageType", ["ORIGINAL", "PRIMARY", "M", "ND", "MOCO"])),
        ("not EPI", lambda item: setattr(item, "ScanningSequence", "GR")),
        ("spin echo", lambda item: setattr(item, "ScanningSequence", ["EP", "SE"])),
        ("spin echo", lambda item: setattr(item, "SequenceName", "epse2d1_64")),
    ],
)
def test_other_series_are_sorted_out_and_are_no_failure_beside_a_run(
    good: Path, tmp_path: Path, kind: str, change: Callable
):
    def other(number: int, item: Dataset) -> bool:
        item.SeriesInstanceUID, item.SOPInstanceUID = generate_uid(entropy_srcs=["other"]), f"1.2.3.{number + 1}"
        change(item)
        return number < 3

    save_series(tmp_path / "alone", slices_of(head(slices=2)), other)
    with pytest.raises(InputError, match=rf"no BOLD series \(1 {kind}\)"):
        convert_folder(tmp_path / "alone", tmp_path / "none")
    (tmp_path / "alone" / "run").symlink_to(good)
    convert_folder(tmp_path / "alone", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "summary.tsv", sep="\t")
    assert table[["kind", "status"]].to_numpy().tolist() == [["BOLD", "converted"], [kind, "not BOLD"]]


def test_a_single_volume_is_no_run(tmp_path: Path):
    save_series(tmp_path / "in", slices_of(head(), vendor="Philips"), lambda number, item: number < 10)
    with pytest.raises(InputError, match=r"no BOLD series \(1 single volume\)"):
        convert_folder(tmp_path / "in", tmp_path / "out")


def test_two_patients_in_one_folder_become_two_subjects(good: Path, tmp_path: Path):
    def another(number: int, item: Dataset) -> None:
        item.StudyInstanceUID, item.SeriesInstanceUID, item.PatientID = "1.2.3", "1.2.3.4", "7"
        item.SOPInstanceUID = f"1.2.3.4.{number}"

    save_series(tmp_path / "in", slices_of(head(seed=1, slices=6)), another)
    (tmp_path / "in" / "good").symlink_to(good)
    convert_folder(tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("sub-*"))) == 2


def test_a_salt_changes_the_names(good: Path, tmp_path: Path):
    (tmp_path / "salt").write_text("secret")
    convert_folder(good, tmp_path / "a")
    convert_folder(good, tmp_path / "b", salt=tmp_path / "salt")
    one, other = ({p.name for p in (tmp_path / name).glob("sub-*")} for name in "ab")
    assert not one & other
    with pytest.raises(InputError, match="salt"):
        convert_folder(good, tmp_path / "c", salt=tmp_path / "none")


def test_loops_of_links_end_and_a_file_seen_twice_counts_once(good: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in" / "self")
    (tmp_path / "in" / "nowhere").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "run").symlink_to(good)
    (tmp_path / "in" / "again").symlink_to(good)
    os.mkfifo(tmp_path / "in" / "pipe")
    assert len(list(files_under(tmp_path / "in"))) == 60
    convert_folder(tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 1


@pytest.mark.parametrize("when", ["gzip", "folder"])
def test_a_disk_that_is_full_leaves_nothing(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"/data/{NAME}")

    if when == "gzip":
        monkeypatch.setattr(gzip.GzipFile, "write", full)
    else:
        monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(InputError) as error:
        convert_folder(good, tmp_path / "out")
    assert str(error.value).startswith("the output folder cannot be written (No space left on device)")
    assert list(tmp_path.iterdir()) == []


def test_dcm2niix_that_runs_out_of_room_is_one_sentence(good: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    """A limit on the size of files stops dcm2niix in the middle of the image."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40000, before[1]))
    try:
        with pytest.raises(InputError, match="dcm2niix"):
            convert_folder(good, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.nii*"))
    assert capfd.readouterr().err == ""


def test_an_output_folder_that_holds_something_is_left_alone(good: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="there already"):
        convert_folder(good, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_folder_without_dicom(tmp_path: Path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "note.txt").write_text(NAME)
    for source in (tmp_path / NAME, tmp_path / f"none {NAME}", tmp_path / ("x" * 300)):
        with pytest.raises(InputError) as error:
            convert_folder(source, tmp_path / "out")
        assert NAME not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["pydicom", "dcm2niix"])
def test_without_the_extra_it_is_one_sentence(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"\[dicom\]"):
        convert_folder(good, tmp_path / "out")


def test_the_command_prints_nothing_personal(
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    source = tmp_path / NAME
    source.mkdir()
    (source / "run").symlink_to(good)
    bad = slices_of(head(slices=2), vendor="Philips")
    save_series(source / "bad", bad, lambda number, item: number != 7)
    monkeypatch.setattr(sys, "argv", ["scripts", "dicom", str(source), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    printed = capfd.readouterr()
    assert printed.err.startswith("error: 1 of 2 BOLD series refused (series ")
    assert len(printed.err.splitlines()) == 1
    content = io.BytesIO()
    for path in (tmp_path / "out").rglob("*"):
        content.write(str(path.relative_to(tmp_path)).encode())
        if path.is_file():
            content.write(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    shown = (printed.out + printed.err + caplog.text).encode() + content.getvalue()
    assert not [secret for secret in SECRETS if secret.encode() in shown]
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 1


def test_only_numbers_and_known_words_are_kept_of_a_sidecar(good: Path):
    (series,) = sort_series(image for image in map(read_image, sorted(good.iterdir())) if image)
    layout = layout_of(series)
    sidecar = {
        "EchoTime": 0.03, "FlipAngle": NAME, "PhaseEncodingDirection": "j-", "PhaseEncodingAxis": NAME,
        "Manufacturer": ["GE"], "StationName": "STATION9", "SliceTiming": [0.0, 0.5, 1.0, 1.5, 1.9, 2.5],
        "PartialFourier": float("nan"), "AcquisitionTime": "10:00",
    }  # fmt: skip
    assert kept_keys(sidecar, layout) == {"EchoTime": 0.03, "PhaseEncodingDirection": "j-"}
    assert kept_keys({"SliceTiming": [0, 1, 0.5, 1.5, 0.2, 1.9]}, layout)["SliceTiming"][5] == 1.9
    assert {"descrip", "aux_file", "intent_name", "db_name"}.isdisjoint(convert.FIELDS)
