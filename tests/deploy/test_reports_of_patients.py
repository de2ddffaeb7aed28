"""Reports of predictions: whose they are, and what must never be in them (`test_reports.py`: what is)."""

import json
import logging
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pydicom
import pytest
from hypothesis import strategies
from predictions import BINARY, INTENDED, LIKE, SHA, complaints, of_source, predicted, run_of, said, series_of, written
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from small_dicom import NAME, SECRETS, head, save_series, slices_of

from bundle.deploy.reports import write_results
from bundle.deploy.results import Result, read_results
from bundle.deploy.results_dicom import COPIED, page, read_source, structured_report
from bundle.deploy.results_page import pdf
from bundle.dicom.convert import convert_folder, read_folder
from bundle.dicom.series import sort_series
from bundle.errors import InputError
from bundle.preparation.sources.participants import run_id_of

RESULT = Result(
    "sub-1", "age", {"predicted": "age"}, False, {"predicted": 41.0}, "", (), INTENDED, ("x", "1"), (SHA,), (), {}
)


def of_another_patient(number: int, item: Dataset) -> None:
    item.PatientName, item.PatientID = "Another^One", "another"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(item, name, generate_uid(entropy_srcs=[item[name].value, "another"]))
    item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_series(tmp_path_factory.mktemp("dicom"), slices_of(head(volumes=2, slices=3)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two patients."""
    folder = tmp_path_factory.mktemp("two")
    save_series(folder / "a", slices_of(head(volumes=2, slices=3)))
    save_series(folder / "b", slices_of(head(volumes=2, slices=3)), of_another_patient)
    return folder


def test_the_reports_are_the_patient_s_and_name_the_whole_series(source: Path, tmp_path: Path):
    write_results(of_source(tmp_path / "in", source), tmp_path / "out", series=source)
    files = [pydicom.dcmread(path) for path in sorted(source.iterdir())]
    report, page, _ = written(tmp_path / "out")
    for made in (report, page):
        for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate"):
            assert made[name].value == files[0][name].value
        assert made.SeriesInstanceUID not in {files[0].SeriesInstanceUID, files[0].StudyInstanceUID}
    assert report.SeriesInstanceUID != page.SeriesInstanceUID
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (files[0].StudyInstanceUID, files[0].SeriesInstanceUID)
    expected = sorted((file.SOPClassUID, file.SOPInstanceUID) for file in files)
    for evidence in (series.ReferencedSOPSequence, page.SourceInstanceSequence):
        assert sorted((one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) for one in evidence) == expected


def test_nothing_personal_is_in_names_messages_fhir_or_the_page_itself(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    folder = of_source(tmp_path / "in", source)
    write_results(folder, tmp_path / "out", series=source)
    report, page, bundle = written(tmp_path / "out")
    own = pydicom.dcmread(next(source.iterdir()))
    uids = [own.StudyInstanceUID, own.SeriesInstanceUID, own.SOPInstanceUID, own.FrameOfReferenceUID]
    document = page.EncapsulatedDocument[: page.EncapsulatedDocumentLength]
    (result,) = read_results(folder)
    assert document == pdf(result)  # which is made without the series
    assert document.startswith(b"%PDF")
    printed = capfd.readouterr()
    names = "".join(path.name for path in (tmp_path / "out").iterdir())
    shown = printed.out + printed.err + caplog.text + names + json.dumps(bundle)
    assert not [secret for secret in (*SECRETS, *uids) if secret in shown]
    kept = {str(element.value) for made in (report, page) for element in made.iterall() if element.VR != "SQ"}
    for secret in ("St. Elsewhere", "MR-SERIAL-77", "secret comment", "STATION9", f"rest of {NAME}"):
        assert secret not in kept


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda number, item: number != 4, "lacks 1 of 6 instances"),
        (lambda number, item: setattr(item, "PatientBirthDate", NAME), "a date or time that is none"),
        (lambda number, item: setattr(item, "StudyTime", NAME), "a date or time that is none"),
        (lambda number, item: setattr(item, "PatientID", f"{NAME}{number}"), "mixes two patients"),
        (
            lambda number, item: [item.pop(f"{word}Date", None) for word in ("Series", "Acquisition", "Study")],
            "no date",
        ),
    ],
)
def test_one_series_that_cannot_be_used_stops_no_other_and_is_one_sentence(
    two: Path, tmp_path: Path, change: Callable, reason: str, caplog: pytest.LogCaptureFixture
):
    folder = of_source(tmp_path / "in", two)
    shutil.copytree(two / "b", tmp_path / "dicom" / "b")
    with pydicom.config.disable_value_validation():
        save_series(tmp_path / "dicom" / "a", slices_of(head(volumes=2, slices=3)), change)
    with pytest.raises(InputError, match=f"1 of 2 participants have no reports.*{reason}") as error:
        write_results(folder, tmp_path / "out", series=tmp_path / "dicom")
    assert not [secret for secret in SECRETS if secret in str(error.value) + caplog.text]
    report, _, _ = written(tmp_path / "out")
    assert report.PatientName == "Another^One"


def test_a_report_gets_to_the_patient_of_its_own_series_whatever_the_participant_is_called(two: Path, tmp_path: Path):
    """The names of two participants are exchanged, as by a mistake; runs keep the hash of their series."""
    one, other = series_of(two)
    runs = {run_of(one): f"sub-{other.subject}", run_of(other): f"sub-{one.subject}"}
    rows = {f"sub-{other.subject}": LIKE, f"sub-{one.subject}": LIKE | {"probability": "0.25"}}
    write_results(predicted(tmp_path / "in", rows, runs), tmp_path / "out", series=two)
    expected = {one.name: LIKE["probability"], other.name: "0.25"}
    for series in (one, other):
        file = pydicom.dcmread(series.images[0].path)
        reports = [pydicom.dcmread(path) for path in (tmp_path / "out").glob("*_sr.dcm")]
        (own,) = [report for report in reports if report.PatientID == file.PatientID]
        assert said(own)["probability of diagnosis adhd"] == [pytest.approx(float(expected[series.name]))]
    write_results(tmp_path / "in", tmp_path / "a", series=two / "a")
    assert len(list((tmp_path / "a").glob("*_sr.dcm"))) == 1  # only of the series that are there


def test_the_name_that_the_conversion_gives_is_that_of_the_run_after_fmriprep(tmp_path: Path):
    source = save_series(tmp_path / "dicom", slices_of(head()))
    convert_folder(source, tmp_path / "bids")
    (bold,) = (tmp_path / "bids").rglob("*_bold.nii.gz")
    after = bold.with_name(bold.name.replace("_bold", "_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold"))
    run_id = run_id_of(after)
    folder = predicted(tmp_path / "in", {"sub-renamed": LIKE}, {run_id: "sub-renamed"})
    write_results(folder, tmp_path / "out", series=source)
    assert len(list((tmp_path / "out").glob("sub-renamed_*"))) == 3


def test_all_scored_series_must_be_there_and_of_one_patient(two: Path, tmp_path: Path):
    one, other = series_of(two)
    runs = dict.fromkeys((run_of(one), run_of(other)), "sub-1")
    folder = predicted(tmp_path / "in", {"sub-1": LIKE}, runs)
    with pytest.raises(InputError, match="2 runs were scored, and of them the folder holds 1; give all"):
        write_results(folder, tmp_path / "out", series=two / "a")
    with pytest.raises(InputError, match="two patients or two studies"):
        write_results(folder, tmp_path / "out", series=two)


def test_another_salt_matches_nothing(source: Path, tmp_path: Path):
    folder = of_source(tmp_path / "in", source)
    (tmp_path / "salt").write_text("secret")
    with pytest.raises(InputError, match="with the same --salt"):
        write_results(folder, tmp_path / "out", series=source, salt=tmp_path / "salt")


def test_a_name_in_another_script_is_carried_over(tmp_path: Path):
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"

    def change(number: int, item: Dataset) -> None:
        item.SpecificCharacterSet, item.PatientName = ["", "ISO 2022 IR 87"], name

    source = save_series(tmp_path / "dicom", slices_of(head(volumes=2, slices=3)), change)
    task = BINARY | {"column": "größe", "classes": ["klein", "groß"]}
    write_results(of_source(tmp_path / "in", source, task=task), tmp_path / "out", series=source)
    report, page, _ = written(tmp_path / "out")
    assert str(report.PatientName) == str(page.PatientName) == name
    assert "probability of größe groß" in said(report)
    for path in (tmp_path / "out").glob("*.dcm"):
        assert complaints(path) == []


@hypothesis.settings(max_examples=30)
@hypothesis.given(name=strategies.sampled_from(COPIED), data=strategies.data())
def test_whatever_a_header_holds_is_carried_over_or_refused_without_being_quoted(
    name: str, data: strategies.DataObject
):
    dated = dictionary_VR(name) in ("DA", "TM")
    codec = "utf-8" if dictionary_VR(name) in ("PN", "LO", "SH") else "ascii"
    digits = "0123456789" if dated else ""  # which could be a date or a time
    letters = strategies.characters(codec=codec, exclude_categories=("C",), exclude_characters=f"^=\\{digits}")
    text = data.draw(strategies.text(letters, min_size=1, max_size=80))
    with TemporaryDirectory() as folder, pydicom.config.disable_value_validation():
        (item,) = slices_of(head(volumes=1, slices=1))
        item.SpecificCharacterSet = "ISO_IR 192"
        setattr(item, name, text)
        save_series(Path(folder), iter([item]))
        stored = str(pydicom.dcmread(Path(folder) / "00000.dcm").get(name) or "")
        (series,) = sort_series(read_folder(Path(folder))[0])
        if dated and stored.strip():
            with pytest.raises(
                InputError, match=r"^its series has a date or time that is none, which [a-z ]+; correct it$"
            ):
                read_source([series], None)
            return
        source = read_source([series], None)
        for make in (structured_report, page):
            made = pydicom.dcmread(BytesIO(make(RESULT, source)))
            expected = "" if name == "PatientSex" and stored not in ("M", "F", "O") else stored
            assert str(made.get(name) or "").strip() == expected.strip()
