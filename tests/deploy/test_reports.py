"""Reports of predictions: what is in them, in every format (`test_reports_of_patients.py`: whose they are).

Truth: the programs and packages of others (dciodvfy, fhir.resources), and the numbers that the tables were given.
"""

import json
import shutil
import sys
from pathlib import Path

import pydicom
import pytest
from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.observation import Observation
from predictions import (
    AGE,
    BINARY,
    INTENDED,
    LIKE,
    REFUSED,
    SHA,
    SUBTYPES,
    UNLIKE,
    complaints,
    entries,
    items,
    of_source,
    predicted,
    run_of,
    said,
    series_of,
    written,
)
from pydicom.dataset import Dataset
from small_dicom import head, save_series, slices_of

from bundle.deploy.reports import FORMATS, write_results
from bundle.deploy.results import read_results
from bundle.deploy.results_fhir import STATUS, check
from bundle.errors import InputError
from scripts.__main__ import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_series(tmp_path_factory.mktemp("dicom"), slices_of(head(volumes=2, slices=3)))


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
