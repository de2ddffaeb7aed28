"""A result as DICOM: a Comprehensive SR (TID 1500), and a page as encapsulated PDF, in the study of its source series.

Patient and study are copied from the series, into these objects and nowhere else.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from typing import Any

from bundle.deploy.results import Result
from bundle.deploy.results_page import pdf
from bundle.dicom.headers import silent
from bundle.dicom.series import Series
from bundle.errors import InputError

COPIED = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
    "StudyTime", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""Attributes of patient and study that a report shares with its series."""
OPTIONAL = ("IssuerOfPatientID", "StudyDescription")
REFERENCE = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
SERIES_NUMBERS = {"SR": 9001, "DOC": 9002}  # far from those of a scanner
UTF_8 = "ISO_IR 192"
SCHEME = "99BRAINFMRI"  # codes of our own begin with 99 (DICOM PS3.16, 8)
ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"
MEANING = 64  # characters that DICOM allows a code's meaning


@dataclass(frozen=True)
class Source:
    """What a report takes from its series.

    Attributes:
        evidence: a data set per instance with `REFERENCE`; the first also with `COPIED`.
        made: the time of the report: as was said, else that of the series; date and time in DICOM's form.
        offset: of all its times from UTC, as the series says; "" where it does not.
    """

    evidence: list[Any]
    made: tuple[str, str]
    offset: str

    def uid(self, *words: str) -> str:
        """A UID that is the same for the same series, time and words."""
        from pydicom.uid import generate_uid

        instances = sorted(str(item.SOPInstanceUID) for item in self.evidence)
        return generate_uid(entropy_srcs=["\n".join([*instances, *self.made, self.offset, *words])])


def read_source(series: Sequence[Series], made: datetime | None) -> Source:
    """Read what a report needs of its series.

    Args:
        series: of one study.
        made: the time of the report; None: that of the first series.

    Raises:
        InputError: a file cannot be read any more, or there is no date, or one that is none.
    """
    from pydicom import dcmread
    from pydicom.valuerep import DA, TM

    paths = [image.path for one in series for image in one.images]
    try:
        with _silent():
            first = dcmread(paths[0], stop_before_pixels=True)
            evidence = [_reference(dcmread(path, specific_tags=list(REFERENCE))) for path in paths]
            for name in COPIED:
                if (value := first.get(name)) or name not in OPTIONAL:
                    setattr(evidence[0], name, str(value or ""))
            if evidence[0].PatientSex not in ("M", "F", "O"):
                evidence[0].PatientSex = ""
            evidence[0].SpecificCharacterSet = UTF_8
            taken, offset = _when(first), str(first.get("TimezoneOffsetFromUTC") or "")
            for date in (evidence[0].PatientBirthDate, evidence[0].StudyDate, *taken[:1]):
                DA(date)
            for time in (evidence[0].StudyTime, *taken[1:]):
                TM(time)
    except OSError:
        raise InputError("its series cannot be read again") from None
    except ValueError:  # which quotes the value
        raise InputError(
            "its series has a date or time that is none, which a report cannot carry; correct it"
        ) from None
    offset = offset if re.fullmatch(r"[+-](0\d|1[0-4])[0-5]\d", offset) else ""
    if made:
        local = made.astimezone(datetime.strptime(offset, "%z").tzinfo) if offset else made
        taken = f"{local:%Y%m%d}", f"{local:%H%M%S}"
    if not taken:
        raise InputError("its series has no date, which a report needs; give --made")
    return Source(evidence, (taken[0], taken[1]), offset)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep pydicom and highdicom from logging, since they quote values and UIDs."""
    logger = logging.getLogger("highdicom")
    was = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with silent():
            yield
    finally:
        logger.setLevel(was)


def _reference(data: Any) -> Any:
    from pydicom import Dataset

    item = Dataset()
    for name in REFERENCE:
        setattr(item, name, str(data[name].value))
    return item


def _when(data: Any) -> tuple[str, ...]:
    """When the series was taken, date and time; its time is midnight where it has none. Empty without a date."""
    for word in ("Series", "Acquisition", "Content", "Study"):
        if date := str(data.get(f"{word}Date") or ""):
            return date, str(data.get(f"{word}Time") or "000000")
    return ()


def structured_report(result: Result, source: Source) -> bytes:
    """A Comprehensive SR file: partial, unverified and preliminary; the measures, or why there are none."""
    import highdicom as hd

    name, version = result.software
    with _silent():
        report = hd.sr.ComprehensiveSR(
            evidence=source.evidence,
            content=_content(result, source),
            **_series("SR", result, source),
            is_complete=False,
            is_final=False,
            is_verified=False,
            coding_schemes=[
                hd.coding_schemes.CodingSchemeIdentificationItem(SCHEME, name, responsible_organization=name)
            ],
            manufacturer=name,
            manufacturer_model_name=name,
            software_versions=version,
            content_date=source.made[0],
            content_time=source.made[1],
            specific_character_set=UTF_8,
        )
        return _file(report, source)


def _series(modality: str, result: Result, source: Source) -> dict[str, Any]:
    words = (modality, result.content(), *result.pictures)
    return {
        "series_instance_uid": source.uid("series", *words),
        "series_number": SERIES_NUMBERS[modality],
        "series_description": f"{result.software[0]}: research only"[:MEANING],
        "sop_instance_uid": source.uid("instance", *words),
        "instance_number": 1,
    }


def _content(result: Result, source: Source) -> Any:
    """The report's content (TID 1500, one group of TID 1501)."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    name, version = result.software
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=source.uid("device", *result.sha256), name=name, manufacturer_name=name, model_name=name
    )
    algorithm = hd.sr.AlgorithmIdentification(
        name=name,
        version=version,
        parameters=[f"sha256 of model {number}: {sha256}" for number, sha256 in enumerate(result.sha256, start=1)],
    )
    unit = codes.UCUM.NoUnits if result.probability else hd.sr.CodedConcept("{own}", "UCUM", "its own unit")
    group = hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(
            uid=source.uid("tracking", result.column), identifier=f"prediction of {result.column}"
        ),
        finding_sites=[hd.sr.FindingSite(codes.SCT.Brain)],
        algorithm_id=algorithm,
        measurements=[
            hd.sr.Measurement(name=_code(column, result.labels[column]), value=value, unit=unit)
            for column, value in result.values.items()
        ],
        qualitative_evaluations=[
            hd.sr.QualitativeEvaluation(_code("status", "Status of the prediction"), _status(result)),
        ],
    )
    for text in (*result.remarks, result.intended_use):
        remark = hd.sr.TextContentItem(codes.DCM.Comment, text, hd.sr.RelationshipTypeValues.CONTAINS)
        group[0].ContentSequence.append(remark)
    observer = hd.sr.ObserverContext(codes.DCM.Device, device)
    return hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.cid100.MRIUnspecifiedBodyRegion,
        imaging_measurements=[group],
    )


def _code(value: str, meaning: str) -> Any:
    import highdicom as hd

    return hd.sr.CodedConcept(value, SCHEME, meaning[:MEANING])


def _status(result: Result) -> Any:
    meanings = {
        "": "value given, preliminary",
        "not-applicable": "no value: unlike the training subjects",
        "error": "no value: could not be scored",
    }
    return _code(result.absent or "given", meanings[result.absent])


def page(result: Result, source: Source) -> bytes:
    """A file of Encapsulated PDF Storage, of modality DOC, which holds `bundle.deploy.results_page.pdf`."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    title = codes.cid7021.ImagingMeasurementReport
    document = pdf(result)
    name, version = result.software
    series = _series("DOC", result, source)
    with _silent():
        data = Dataset()
        for word in COPIED:
            if word in source.evidence[0]:
                setattr(data, word, source.evidence[0][word].value)
        data.SpecificCharacterSet = UTF_8
        data.SOPClassUID, data.SOPInstanceUID = ENCAPSULATED_PDF, series["sop_instance_uid"]
        data.Modality, data.SeriesInstanceUID = "DOC", series["series_instance_uid"]
        data.SeriesNumber, data.InstanceNumber = series["series_number"], series["instance_number"]
        data.SeriesDescription = series["series_description"]
        data.Manufacturer = data.ManufacturerModelName = name
        data.SoftwareVersions, data.ConversionType = version, "WSD"
        data.ContentDate, data.ContentTime = source.made
        data.AcquisitionDateTime = ""
        data.BurnedInAnnotation = "NO"  # the page names the participant by a hash, not the patient
        data.DocumentTitle = f"Prediction of {result.column}, research only"
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = (
            title.value,
            title.scheme_designator,
            title.meaning,
        )
        data.ConceptNameCodeSequence = [item]
        data.SourceInstanceSequence = [_instance(one) for one in source.evidence]
        data.MIMETypeOfEncapsulatedDocument = "application/pdf"
        data.EncapsulatedDocument = document + b"\0" * (len(document) % 2)
        data.EncapsulatedDocumentLength = len(document)
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        return _file(data, source)


def _instance(evidence: Any) -> Any:
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = evidence.SOPClassUID, evidence.SOPInstanceUID
    return item


def _file(data: Any, source: Source) -> bytes:
    """The bytes of a file, with no time of its making but the report's."""
    for equipment in data.get("ContributingEquipmentSequence", ()):  # highdicom names itself, and says when
        del equipment.ContributionDateTime
    data.InstanceCreationDate, data.InstanceCreationTime = source.made
    if source.offset:
        data.TimezoneOffsetFromUTC = source.offset
    file = BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()
