"""Real series of ../shared/dicom, whole and broken: what comes out, what is refused, and that nothing personal leaks.

Truth: the NIfTI files in Ref/, made by others, and numbers read off the headers by hand. Not covered here: classic
series, of which no real one is at hand (see test_classic_series.py).
"""

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from nibabel.processing import resample_from_to
from pydicom.multival import MultiValue

from bundle.dicom.convert import convert_folder
from bundle.errors import InputError
from bundle.preparation.prepare import prepare
from bundle.preparation.sources import find_runs

MOSAIC = "siemens_mosaic_D13/In/ep2d_Int_4"
REVERSED = "siemens_mosaic_D13/In/ep2d_Int_HF_5"
MULTIBAND = "siemens_mosaic_D13/In/cmrr_Int_8"
ENHANCED = "xa30_enhanced/In/7_func-bold_task-fa_run-1"
FIELD_MAP = "xa30_enhanced/In/9_gre_field_mapping"
DIFFUSION = "xa30_enhanced/In/12_DWI_dir80_PA"
TEXT = ("PN", "DA", "DT", "TM", "UI", "LT", "ST", "LO", "SH", "AE", "AS", "UT")


@pytest.fixture(scope="session")
def real(shared: Path) -> Path:
    if not (shared / "dicom").is_dir():
        pytest.skip("the real DICOM series ../shared/dicom are absent")
    return shared / "dicom"


def copied(real: Path, folder: Path, *names: str) -> list[Path]:
    """Copies of series in a folder, which a test may break; sorted by instance."""
    files = []
    for name in names:
        shutil.copytree(real / name, folder / Path(name).name)
        files += sorted((folder / Path(name).name).iterdir())
    for file in files:
        file.chmod(0o644)
    return files


def rewritten(file: Path, change: Callable[[pydicom.Dataset], None]) -> None:
    data = pydicom.dcmread(file)
    change(data)
    data.save_as(file)


def outputs(folder: Path) -> dict[str, Path]:
    """NIfTI files by series."""
    table = pd.read_csv(folder / "summary.tsv", sep="\t", dtype=str)
    done = table[table["status"] == "converted"]
    assert sorted(done["file"]) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.nii.gz"))
    return {series: folder / file for series, file in zip(done["series"], done["file"], strict=True)}


def only(folder: Path) -> nib.Nifti1Image:
    (path,) = outputs(folder).values()
    return nib.load(path)


@pytest.mark.parametrize(
    ("name", "reference"), [(MOSAIC, "4_ep2d_Int"), (REVERSED, "5_ep2d_Int_HF"), (MULTIBAND, "8_cmrr_Int")]
)
def test_a_mosaic_is_the_reference_nifti(real: Path, tmp_path: Path, name: str, reference: str):
    convert_folder(real / name, tmp_path / "out")
    image = only(tmp_path / "out")
    expected = nib.load(real / "siemens_mosaic_D13" / "Ref" / f"{reference}.nii")
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-4)
    assert image.header.get_zooms()[3] == pytest.approx(3.2)
    (sidecar,) = (tmp_path / "out").rglob("*_bold.json")
    content = json.loads(sidecar.read_text())
    truth = json.loads((real / "siemens_mosaic_D13" / "Ref" / f"{reference}.json").read_text())
    assert content["RepetitionTime"] == 3.2
    for key in ("SliceTiming", "EchoTime", "FlipAngle", "PhaseEncodingDirection"):
        assert content[key] == pytest.approx(truth[key], abs=1e-3), key


def test_reversed_slice_numbers_give_the_same_head_the_same_way_up(real: Path, tmp_path: Path):
    """Two scans of one head, with the same field of view: the head is where it was, and not mirrored."""
    convert_folder(real / MOSAIC, tmp_path / "a")
    convert_folder(real / REVERSED, tmp_path / "b")
    one, other = (nib.funcs.four_to_three(only(tmp_path / name))[3] for name in "ab")
    still, moved = np.asarray(one.dataobj, float), resample_from_to(other, one, order=1).get_fdata()
    alike = [np.corrcoef(still.ravel(), np.flip(moved, axes).ravel())[0, 1] for axes in ((), 0, 1, 2)]
    assert alike[0] > 0.95, alike
    assert max(alike[1:]) < 0.9, alike


def test_an_enhanced_run_amid_other_series_is_found_and_placed(real: Path, tmp_path: Path):
    """Voxels against pixels and places that pydicom reads from the files of two volumes."""
    copied(real, tmp_path / "in", ENHANCED, FIELD_MAP, DIFFUSION)
    convert_folder(tmp_path / "in", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "summary.tsv", sep="\t")
    assert sorted(table["kind"]) == ["BOLD", "diffusion", "phase"]
    assert table["status"].tolist() == ["converted", "not BOLD", "not BOLD"]
    image = only(tmp_path / "out")
    assert image.shape == (64, 64, 33, 20)
    assert image.header.get_zooms()[3] == 1.0
    values = np.asarray(image.dataobj)
    files = sorted((real / ENHANCED).iterdir())
    for volume in (0, 13):
        data = pydicom.dcmread(files[volume])
        assert data.InstanceNumber == volume + 1
        for number in (0, 20):
            group = data.PerFrameFunctionalGroupsSequence[number]
            start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
            right, down = np.reshape(np.array(group.PlaneOrientationSequence[0].ImageOrientationPatient, float), (2, 3))
            for row, column in ((20, 40), (50, 10), (33, 31)):
                world = (start + right * 3.375 * column + down * 3.375 * row) * [-1, -1, 1]  # LPS to RAS
                voxel = nib.affines.apply_affine(np.linalg.inv(image.affine), world)
                np.testing.assert_allclose(voxel, np.rint(voxel), atol=0.01)
                assert values[(*np.rint(voxel).astype(int), volume)] == data.pixel_array[number, row, column]


def test_all_volumes_in_one_enhanced_file(real: Path, tmp_path: Path):
    files = [pydicom.dcmread(file) for file in sorted((real / ENHANCED).iterdir())]
    merged = files[0]
    merged.PixelData = b"".join(file.PixelData for file in files)
    merged.PerFrameFunctionalGroupsSequence = [g for file in files for g in file.PerFrameFunctionalGroupsSequence]
    merged.NumberOfFrames = 20 * 33
    (tmp_path / "in").mkdir()
    merged.save_as(tmp_path / "in" / "all.dcm")
    convert_folder(tmp_path / "in", tmp_path / "out")
    convert_folder(real / ENHANCED, tmp_path / "separate")
    one, other = only(tmp_path / "out"), only(tmp_path / "separate")
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
    np.testing.assert_allclose(one.affine, other.affine)


def test_two_series_and_a_foreign_file_are_sorted(real: Path, tmp_path: Path):
    """All in one folder, under names that say nothing, as a disc from a hospital holds them."""
    files = copied(real, tmp_path / "in", MOSAIC, REVERSED)
    for number, file in enumerate(sorted(files, key=lambda file: hash(file.name[-6:]))):
        file.rename(tmp_path / "in" / f"I{number}")
    (tmp_path / "in" / "note.txt").write_text("not DICOM")
    convert_folder(tmp_path / "in", tmp_path / "out")
    assert len(outputs(tmp_path / "out")) == 2
    assert len(list((tmp_path / "out").glob("sub-*"))) == 1  # one study, one subject


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("siemens_stc/In/Siemens/B13/4_fMRIcontin", "too short: 3 volumes at 2.2 s are 6 frames at 0.8 s"),
        ("siemens_stc/In/Siemens/E11/7_Rest_fMRI_AP", "too short: 2 volumes at 1.3 s are 2 frames"),
        ("phantom_siemens_mosaic", "no brain"),
        (FIELD_MAP, "no BOLD series (1 phase)"),
        (DIFFUSION, "no BOLD series (1 diffusion)"),
    ],
)
def test_what_must_be_refused(real: Path, tmp_path: Path, name: str, reason: str):
    with pytest.raises(InputError) as error:
        convert_folder(real / name, tmp_path / "out")
    assert reason in str(error.value)
    assert not list((tmp_path / "out").rglob("*.nii*"))


def _leave_out(number: int) -> Callable[[list[Path]], None]:
    return lambda files: files[number].unlink()


def _double(files: list[Path]) -> None:
    shutil.copy(files[2], files[2].with_name("again.dcm"))


def _truncate(files: list[Path]) -> None:
    files[3].write_bytes(files[3].read_bytes()[:-1])


def _cut_in_the_header(files: list[Path]) -> None:
    files[3].write_bytes(files[3].read_bytes()[:2000])


def _phase(files: list[Path]) -> None:
    def change(data: pydicom.Dataset) -> None:
        data.ImageType = ["ORIGINAL", "PRIMARY", "P", "ND", "MOSAIC"]

    rewritten(files[1], change)


def _another_patient(files: list[Path]) -> None:
    rewritten(files[4], lambda data: setattr(data, "PatientID", "another"))


def _another_tr(files: list[Path]) -> None:
    rewritten(files[4], lambda data: setattr(data, "RepetitionTime", 3000))


def _one_uid(files: list[Path]) -> None:
    """The images of another series under this one's UID and with numbers that follow."""
    uid = pydicom.dcmread(files[0]).SeriesInstanceUID
    for number, file in enumerate(files[6:], start=7):
        rewritten(
            file, lambda data, n=number: (setattr(data, "SeriesInstanceUID", uid), setattr(data, "InstanceNumber", n))
        )


def _no_manufacturer(files: list[Path]) -> None:
    """dcm2niix then places a mosaic by the corner of the mosaic, hundreds of mm away, and exits with 0."""
    for file in files:
        rewritten(file, lambda data: delattr(data, "Manufacturer"))


def _fewer_rows(files: list[Path]) -> None:
    for file in files:
        rewritten(file, lambda data: setattr(data, "Rows", 192))


def _odd_length(files: list[Path]) -> None:
    """pydicom raises an error of its own kind, which quotes bytes of the header."""
    content = bytearray(files[2].read_bytes())
    content[content.index(b"\x28\x00\x10\x00US") + 6] = 3
    files[2].write_bytes(content)


def _burned_in_text(files: list[Path]) -> None:
    for file in files:
        rewritten(file, lambda data: setattr(data, "BurnedInAnnotation", "YES"))


@pytest.mark.parametrize(
    ("names", "damage", "reason"),
    [
        ([MOSAIC], _leave_out(2), "lacks 1 of 6 instances, the first being 3"),
        ([MOSAIC], _leave_out(0), "lacks 1 of 6 instances, the first being 1"),
        ([MULTIBAND], _leave_out(-1), "too short"),
        ([ENHANCED], _leave_out(11), "lacks 1 of 20 instances, the first being 12"),
        ([ENHANCED], _leave_out(-1), "holds 19 of the 20 volumes"),
        ([MOSAIC], _double, "holds the instance 3 2 times"),
        ([ENHANCED], _double, "holds the instance 3 2 times"),
        ([MOSAIC], _truncate, "(instance 4) that is truncated"),
        ([ENHANCED], _truncate, "(instance 4) that is truncated"),
        ([MOSAIC], _cut_in_the_header, "files that cannot be read as DICOM or name no series: 1"),
        ([MOSAIC], _phase, "mixes BOLD with other images (phase)"),
        ([MOSAIC], _another_patient, "mixes two patients or two studies"),
        ([MOSAIC], _another_tr, "mixes 2 repetition times"),
        ([MOSAIC, REVERSED], _one_uid, "mixes"),
        ([MULTIBAND], _no_manufacturer, "lies elsewhere by its headers than by dcm2niix"),
        ([MOSAIC], _fewer_rows, "truncated or damaged"),
        ([MOSAIC], _odd_length, "(instance 3) that has a damaged header"),
        ([MOSAIC], _burned_in_text, "text burned into its pixels"),
    ],
)
def test_broken_series_are_refused_in_one_sentence(
    real: Path, tmp_path: Path, names: list[str], damage: Callable, reason: str
):
    damage(copied(real, tmp_path / "in", *names))
    with pytest.raises(InputError) as error:
        convert_folder(tmp_path / "in", tmp_path / "out")
    assert reason in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.nii*"))
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_scan_that_was_stopped_is_taken_when_the_user_says_so(real: Path, tmp_path: Path):
    _leave_out(-1)(copied(real, tmp_path / "in", ENHANCED))
    convert_folder(tmp_path / "in", tmp_path / "out", stopped=True)
    assert only(tmp_path / "out").shape[3] == 19


def test_a_good_series_is_converted_beside_a_broken_one(real: Path, tmp_path: Path):
    _leave_out(2)(copied(real, tmp_path / "in", MOSAIC, ENHANCED))
    with pytest.raises(InputError, match="1 of 2 BOLD series refused"):
        convert_folder(tmp_path / "in", tmp_path / "out")
    assert only(tmp_path / "out").shape == (64, 64, 33, 20)


def test_nothing_personal_is_in_an_output_a_log_or_an_error(
    real: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
):
    """Every text of the headers that could say who, where or when, against every byte that comes out."""
    source = tmp_path / "Doe^Jane"
    names = [ENHANCED, FIELD_MAP, MOSAIC, "siemens_stc/In/Siemens/B13/4_fMRIcontin"]
    files = copied(real, source, *names)
    secrets = {"Doe^Jane", "Rorden"}
    for file in files:
        for element in pydicom.dcmread(file, stop_before_pixels=True).iterall():
            if element.VR in TEXT and element.tag.group % 2 == 0:
                values = element.value if isinstance(element.value, MultiValue) else [element.value]
                secrets |= {str(value) for value in values if len(str(value)) > 5}
    secrets = {secret.encode() for secret in secrets if not secret.startswith("1.2.840.10008")}  # the standard's own
    assert len(secrets) > 100
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InputError) as error:
        convert_folder(source, tmp_path / "out")
    printed = capfd.readouterr()
    texts = [str(error.value), repr(error.value.__cause__), caplog.text, printed.out, printed.err]
    found = {"messages": " ".join(texts).encode()}
    for path in (tmp_path / "out").rglob("*"):
        found[path.name] = str(path.relative_to(tmp_path)).encode() + (path.read_bytes() if path.is_file() else b"")
        if path.suffix == ".gz":
            content = path.read_bytes()
            assert content[3] == 0  # no name in the gzip header
            assert content[4:8] == bytes(4)  # and no time
            found[path.name] += gzip.decompress(content)[:400]
            assert nib.load(path).header["descrip"] == nib.load(path).header["aux_file"] == b""
    allowed = {b"Siemens", b"SIEMENS"}
    leaks = {(name, secret) for name, text in found.items() for secret in secrets - allowed if secret in text}
    assert not leaks
    assert len(found) > 5


def test_what_comes_out_is_in_native_space_and_preparation_refuses_it(real: Path, tmp_path: Path):
    convert_folder(real / ENHANCED, tmp_path / "bids")
    with pytest.raises(InputError, match="MNI"):
        prepare(find_runs(tmp_path / "bids", labels="optional"), tmp_path / "store")
    assert not list((tmp_path / "store").rglob("frames.npy"))
