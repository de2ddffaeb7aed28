"""Reports of predictions: what is in them, whose they are, and what must never be in them.

Truth: the programs and packages of others (dciodvfy, fhir.resources), and the numbers that the tables were given.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pydicom
import pytest
from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.observation import Observation
from hypothesis import strategies
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from small_dicom import NAME, SECRETS, head, save_series, slices_of

from bundle.deploy.reports import FORMATS, write_results
from bundle.deploy.results import Result, read_results
from bundle.deploy.results_dicom import COPIED, page, read_source, structured_report
from bundle.deploy.results_fhir import STATUS, check
from bundle.deploy.results_page import pdf
from bundle.dicom.convert import convert_folder, read_folder
from bundle.dicom.series import Series, sort_series
from bundle.errors import InputError
from bundle.files import write_json
from bundle.preparation.sources.participants import run_id_of
from scripts.__main__ import main

INTENDED = "Research only. Not a medical device; not for diagnosis."
SHA = "0123456789abcdef" * 4
BINARY = {"kind": "binary", "column": "diagnosis", "classes": ["control", "adhd"], "mean": 0.0, "sd": 1.0}
AGE = {"kind": "regression", "column": "age", "classes": [], "mean": 30.0, "sd": 9.0}
SUBTYPES = BINARY | {"kind": "multiclass", "column": "subtype", "classes": ["control", "inattentive", "low"]}
LIKE = {"probability": "0.7312345678901234567", "unlike": "0.31", "flag": "like", "reasons": "", "known": ""}
UNLIKE = LIKE | {"unlike": "0.9993", "flag": "unlike", "reasons": "a TR of 3.2 s"}
REFUSED = UNLIKE | {"flag": "refused", "probability": ""}
RESULT = Result(
    "sub-1", "age", {"predicted": "age"}, False, {"predicted": 41.0}, "", (), INTENDED, ("x", "1"), (SHA,), (), {}
)


def series_of(source: Path) -> list[Series]:
    return [series for series in sort_series(read_folder(source)[0]) if series.kind == "BOLD"]


def run_of(series: Series) -> str:
    return f"sub-{series.subject}_task-rest_acq-{series.name}"


def predicted(
    folder: Path,
    rows: dict[str, dict[str, str]],
    runs: dict[str, str],
    task: dict = BINARY,
    shas: tuple[str, ...] = (SHA,),
    warnings: dict[str, str] | None = None,
) -> Path:
    """What inference leaves behind: rows by participant; runs with their participants."""
    (folder / "store").mkdir(parents=True)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["participant_id", *columns], *([name, *(row[c] for c in columns)] for name, row in rows.items())]
    (folder / "predictions.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    lines = [["run_id", "participant_id", "status"], *([run, name, "prepared"] for run, name in runs.items())]
    (folder / "store" / "summary.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    model = {"task": task, "sha256": shas[0], "members": [{"sha256": sha} for sha in shas]}
    facts = {"model": model, "versions": {"brain_fmri_roi_mae": "1.2.3"}, "intended_use": INTENDED}
    write_json(folder / "predictions.json", facts | {"warnings": warnings or {}})
    return folder


def of_source(folder: Path, source: Path, row: dict[str, str] = LIKE, **more: object) -> Path:
    """Predictions of each series of a source, under the names that the conversion gives."""
    series = series_of(source)
    rows = {f"sub-{one.subject}": row for one in series}
    return predicted(folder, rows, {run_of(one): f"sub-{one.subject}" for one in series}, **more)


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


def written(out: Path) -> tuple[Dataset, Dataset, dict]:
    (sr,), (page,), (fhir,) = (list(out.glob(f"*_{ending}")) for ending in FORMATS.values())
    return pydicom.dcmread(sr), pydicom.dcmread(page), json.loads(fhir.read_text())


def items(data: Dataset) -> Iterator[Dataset]:
    """All content items of an SR."""
    for item in data.get("ContentSequence", ()):
        yield item
        yield from items(item)


def said(report: Dataset) -> dict[str, list]:
    """Values by the meaning of their names."""
    found: dict[str, list] = {}
    for item in items(report):
        if item.ValueType == "NUM":
            value = item.MeasuredValueSequence[0].FloatingPointValue
        elif item.ValueType == "CODE":
            value = item.ConceptCodeSequence[0].CodeMeaning
        else:
            value = item.get("TextValue")
        found.setdefault(item.ConceptNameCodeSequence[0].CodeMeaning, []).append(
            "".join(value) if isinstance(value, list) else value
        )
    return found


def entries(bundle: dict, kind: str) -> list[dict]:
    return [entry["resource"] for entry in bundle["entry"] if entry["resource"]["resourceType"] == kind]


def complaints(path: Path) -> list[str]:
    """What dciodvfy calls an error."""
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy is not installed (Debian: apt-get install dicom3tools)")
    done = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, errors="replace")
    assert re.search("^(ComprehensiveSR|EncapsulatedPDF)$", done.stderr, flags=re.M)
    return [line for line in done.stderr.splitlines() if line.startswith("Error")]


def test_a_score_is_in_the_sr_with_model_and_version_and_is_not_final(source: Path, tmp_path: Path):
    write_results(of_source(tmp_path / "in", source), tmp_path / "out", series=source)
    report, page, _ = written(tmp_path / "out")
    found = said(report)
    assert found["probability of diagnosis adhd"] == [pytest.approx(0.7312345678901234567, rel=1e-15)]
    assert found["Algorithm Name"] == ["brain_fmri_roi_mae"]
    assert found["Algorithm Version"] == ["1.2.3"]
    assert found["Algorithm Parameters"] == [f"sha256 of model 1: {SHA}"]
    assert found["Comment"] == [INTENDED]
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "PARTIAL", "UNVERIFIED", "PRELIMINARY",
    )  # fmt: skip
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert (report.Modality, page.Modality) == ("SR", "DOC")


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


@pytest.mark.parametrize("row", [LIKE, UNLIKE, REFUSED], ids=lambda row: row["flag"])
def test_sr_and_pdf_are_valid_for_dciodvfy(source: Path, tmp_path: Path, row: dict):
    write_results(of_source(tmp_path / "in", source, row), tmp_path / "out", series=source)
    for path in (tmp_path / "out").glob("*.dcm"):
        assert complaints(path) == []


@pytest.mark.parametrize(
    ("task", "values", "expected"),
    [
        (AGE, {"predicted": "-41.20000000000000001"}, {"predicted age in its own units": -41.2}),
        (
            BINARY,
            {"probability": "1e-17", "probability_low": "0.0", "probability_high": "1.0"},
            {
                "probability of diagnosis adhd": 1e-17,
                "probability of diagnosis adhd, the least of the networks": 0.0,
                "probability of diagnosis adhd, the largest of the networks": 1.0,
            },
        ),
        (
            SUBTYPES,
            {"probability_control": "0.2", "probability_inattentive": "0.3", "probability_low": "0.5"},
            {
                "probability of subtype control": 0.2,
                "probability of subtype inattentive": 0.3,
                "probability of subtype low": 0.5,
            },
        ),
    ],
)
def test_every_task_s_measures_are_written(source: Path, tmp_path: Path, task: dict, values: dict, expected: dict):
    row = {name: value for name, value in LIKE.items() if name != "probability"} | values
    shas = (SHA, SHA[::-1])
    write_results(of_source(tmp_path / "in", source, row, task=task, shas=shas), tmp_path / "out", series=source)
    report, _, bundle = written(tmp_path / "out")
    numbers = {name: value for name, (value, *_) in said(report).items() if isinstance(value, float)}
    assert numbers == pytest.approx(expected)
    seen = {one["code"]["text"]: one["valueQuantity"]["value"] for one in entries(bundle, "Observation")}
    assert seen == pytest.approx(expected)
    assert len(said(report)["Algorithm Parameters"]) == 2
    for path in (tmp_path / "out").glob("*.dcm"):
        assert complaints(path) == []


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        (UNLIKE, "not-applicable", "unlike those of the training subjects (percentile 0.9993), in: a TR of 3.2 s"),
        (REFUSED, "not-applicable", "unlike those of the training subjects"),
        (LIKE | {"flag": "n/a", "probability": "n/a"}, "error", "could not be scored"),
        (LIKE | {"flag": "something new"}, "error", "could not be scored"),
        (LIKE | {"probability": "nan"}, "error", "missing or not a number"),
        (LIKE | {"probability": ""}, "error", "missing or not a number"),
    ],
)
def test_a_score_that_must_not_be_trusted_is_in_no_report(
    source: Path, tmp_path: Path, row: dict, code: str, words: str
):
    folder = of_source(tmp_path / "in", source, row)
    write_results(folder, tmp_path / "out", series=source)
    report, _, bundle = written(tmp_path / "out")
    assert not [item for item in items(report) if item.ValueType == "NUM"]
    found = said(report)
    assert words in found["Comment"][0]
    assert found["Status of the prediction"][0].startswith("no value")
    (observation,) = entries(bundle, "Observation")
    assert not [name for name in observation if name.startswith("value")]
    assert observation["dataAbsentReason"]["coding"][0]["code"] == code
    assert words in observation["dataAbsentReason"]["text"]
    assert words in entries(bundle, "DiagnosticReport")[0]["conclusion"]
    (result,) = read_results(folder)
    assert result.values == {}  # of which SR, FHIR and page are made
    for path in (tmp_path / "out").iterdir():
        assert b"0.7312" not in path.read_bytes()


def test_what_weakens_a_score_goes_with_it(source: Path, tmp_path: Path):
    (series,) = series_of(source)
    row = LIKE | {"known": "training"}
    folder = of_source(tmp_path / "in", source, row, warnings={run_of(series): "another mask", "sub-x": "not of it"})
    with (folder / "store" / "summary.tsv").open("a") as file:
        file.write(f"sub-{series.subject}_task-rest_run-2\tsub-{series.subject}\tfailed\n")
    write_results(folder, tmp_path / "out", series=source)
    report, _, bundle = written(tmp_path / "out")
    remarks = said(report)["Comment"]
    assert remarks == [note["text"] for note in entries(bundle, "Observation")[0]["note"]]
    assert remarks == [
        "A run of this participant is in the training set of the model, so the score is no test.",
        "1 of 2 runs could not be used.",
        "Another mask.",
        INTENDED,
    ]


@pytest.mark.parametrize("row", [LIKE, UNLIKE], ids=lambda row: row["flag"])
def test_fhir_is_valid_preliminary_and_names_model_and_version(tmp_path: Path, row: dict):
    write_results(
        predicted(tmp_path / "in", {"sub-01": row}, {"sub-01_task-rest": "sub-01"}), tmp_path / "out", ["fhir"]
    )
    text = (tmp_path / "out" / "sub-01_fhir.json").read_text()
    Bundle.model_validate_json(text)
    bundle = json.loads(text)
    (report,), (observation,), (device,) = (
        entries(bundle, kind) for kind in ("DiagnosticReport", "Observation", "Device")
    )
    addresses = {entry["resource"]["resourceType"]: entry["fullUrl"] for entry in bundle["entry"]}
    assert report["status"] == observation["status"] == "preliminary"
    assert report["result"] == [{"reference": addresses["Observation"]}]
    assert observation["device"] == {"reference": addresses["Device"]}
    assert [one["value"] for one in device["version"]] == ["1.2.3", SHA]
    assert report["subject"] == observation["subject"] == {"identifier": {"value": "sub-01"}}


def test_a_status_that_fhir_does_not_know_is_refused_though_fhir_resources_takes_it():
    observation = {"resourceType": "Observation", "status": "bogus", "code": {"text": "x"}}
    Observation.model_validate(observation)
    for kind, known in STATUS.items():
        for status in ("bogus", "Final", "", "+", *known):
            resource = observation | {"resourceType": kind, "status": status}
            whole = {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": resource}]}
            for one in (resource, whole):
                if status in known:
                    check(one)
                else:
                    with pytest.raises(InputError, match="is no valid FHIR R4B: "):
                        check(one)
    with pytest.raises(InputError, match="no valid FHIR R4B: code"):
        check({"resourceType": "Observation", "status": "final"})


def test_from_nifti_alone_there_is_no_sr(tmp_path: Path, source: Path):
    folder = predicted(tmp_path / "in", {"sub-01": LIKE}, {"sub-01_task-rest": "sub-01"})
    for formats in (["sr"], ["pdf"], tuple(FORMATS)):
        with pytest.raises(InputError, match="from NIfTI alone there is none; give --series FOLDER"):
            write_results(folder, tmp_path / "out", formats)
    with pytest.raises(InputError, match="none of the 1 BOLD series is one that was scored"):
        write_results(folder, tmp_path / "out", series=source)
    assert not (tmp_path / "out").exists()


def test_the_same_input_twice_gives_the_same_bytes_and_another_score_another_object(source: Path, tmp_path: Path):
    folder = of_source(tmp_path / "in", source)
    for name in ("a", "b"):
        write_results(folder, tmp_path / name, series=source)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    write_results(of_source(tmp_path / "other", source, LIKE | {"probability": "0.5"}), tmp_path / "c", series=source)
    write_results(folder, tmp_path / "d", series=source, made="2026-01-31T14:30:00+01:00")
    reports = [written(tmp_path / name) for name in "acd"]
    for number in (0, 1):
        assert len({made[number].SOPInstanceUID for made in reports}) == 3
    assert len({made[2]["entry"][0]["fullUrl"] for made in reports}) == 3


def test_the_time_is_that_of_the_series_or_what_was_said(source: Path, tmp_path: Path):
    folder = of_source(tmp_path / "in", source)
    write_results(folder, tmp_path / "a", series=source)
    write_results(folder, tmp_path / "b", series=source, made="2026-01-31T14:30:00.5+01:00")
    (first, page, bundle), (second, later, other) = written(tmp_path / "a"), written(tmp_path / "b")
    assert first.ContentDate == page.ContentDate == "19700102"
    assert "issued" not in entries(bundle, "Observation")[0]
    for made in (second, later):
        assert (made.ContentDate, made.ContentTime) == ("20260131", "143000")
    assert entries(other, "DiagnosticReport")[0]["issued"] == "2026-01-31T14:30:00+01:00"
    for text in ("today", "2026-01-31", "2026-01-31T14:30:00"):
        with pytest.raises(InputError, match="--made must be a date and time with its offset"):
            write_results(folder, tmp_path / "c", series=source, made=text)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [("-0500", ("20260130", "193000", "-0500")), ("+9999", ("20260131", "013000", None))],
)
def test_a_time_is_brought_to_the_series_offset(tmp_path: Path, offset: str, expected: tuple):
    def change(number: int, item: Dataset) -> None:
        item.TimezoneOffsetFromUTC = offset

    source = save_series(tmp_path / "dicom", slices_of(head(volumes=2, slices=3)), change)
    folder = of_source(tmp_path / "in", source)
    write_results(folder, tmp_path / "out", series=source, made="2026-01-31T01:30:00+01:00")
    for made in written(tmp_path / "out")[:2]:
        assert (made.ContentDate, made.ContentTime, made.get("TimezoneOffsetFromUTC")) == expected


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


@pytest.mark.parametrize("module", ["highdicom", "fhir"])
def test_without_the_extra_it_is_one_sentence(source: Path, tmp_path: Path, monkeypatch, module: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"\[results\]"):
        write_results(of_source(tmp_path / "in", source), tmp_path / "out", series=source)


def test_what_cannot_be_read_is_one_sentence(source: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no predictions"):
        write_results(tmp_path / "empty", tmp_path / "out", ["fhir"])
    folder = of_source(tmp_path / "in", source)
    with pytest.raises(InputError, match="no such format"):
        write_results(folder, tmp_path / "out", ["xml"])
    for broken in ("{", "[]", "{}", '{"model": {}, "warnings": {}, "versions": {}, "intended_use": ""}'):
        (folder / "predictions.json").write_text(broken)
        with pytest.raises(InputError, match="was made with; predict again"):
            write_results(folder, tmp_path / "out", ["fhir"])


def test_files_of_an_earlier_call_do_not_stay_where_the_new_one_fails(source: Path, tmp_path: Path):
    folder = of_source(tmp_path / "in", source)
    write_results(folder, tmp_path / "out", series=source)
    shutil.copytree(source, tmp_path / "dicom")
    next((tmp_path / "dicom").iterdir()).unlink()
    with pytest.raises(InputError, match="1 of 1 participants have no reports"):
        write_results(folder, tmp_path / "out", series=tmp_path / "dicom")
    assert not list((tmp_path / "out").iterdir())


def test_the_command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["results", str(of_source(tmp_path / "in", source)), str(tmp_path / "out"), "--series", str(source)]
    monkeypatch.setattr(sys, "argv", ["scripts", *words, "--format", "sr,fhir"])
    main()
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    "name",
    [
        "siemens_mosaic_D13/In/ep2d_Int_4",
        "siemens_mosaic_D13/In/cmrr_Int_8",
        "xa30_enhanced/In/7_func-bold_task-fa_run-1",
    ],
)
def test_reports_of_real_series_are_valid(shared: Path, tmp_path: Path, name: str):
    if not (shared / "dicom").is_dir():
        pytest.skip("the real DICOM series ../shared/dicom are absent")
    source = shared / "dicom" / name
    write_results(of_source(tmp_path / "in", source), tmp_path / "out", series=source)
    report, page, _ = written(tmp_path / "out")
    file = pydicom.dcmread(next(source.iterdir()))
    assert report.PatientName == page.PatientName == file.PatientName
    assert len(page.SourceInstanceSequence) == len(list(source.iterdir()))
    for path in (tmp_path / "out").glob("*.dcm"):
        assert complaints(path) == []
