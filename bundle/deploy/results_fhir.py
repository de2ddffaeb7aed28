"""A result as FHIR R4B: a Bundle of a DiagnosticReport, an Observation per measure, and the Device that made them.

The subject is the participant's name in the table, never the patient: who brings the bundle into a record knows whose.
"""

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bundle.deploy.results import Result
from bundle.errors import InputError

STATUS = {
    "Observation": {
        "registered", "preliminary", "final", "amended", "corrected", "cancelled", "entered-in-error", "unknown",
    },
    "DiagnosticReport": {
        "registered", "partial", "preliminary", "final", "amended", "corrected", "appended", "cancelled",
        "entered-in-error", "unknown",
    },
}  # fmt: skip
"""Required by hl7.org/fhir/R4B/valueset-observation-status.html and valueset-diagnostic-report-status.html."""
ABSENT = "http://terminology.hl7.org/CodeSystem/data-absent-reason"


def bundle(result: Result, made: datetime | None) -> dict[str, Any]:
    """The bundle as JSON, checked.

    Args:
        result: what is reported.
        made: when it was made; None: the resources have no time.

    Raises:
        InputError: what is to be reported does not fit into FHIR.
    """
    name, version = result.software
    issued = {"issued": made.isoformat()} if made else {}
    device, report = _address(result, made, "Device"), _address(result, made, "DiagnosticReport")
    common = {"subject": {"identifier": {"value": result.participant}}, **issued}
    notes = [{"text": text} for text in (*result.remarks, result.intended_use)]
    observations = {
        _address(result, made, "Observation", column): {
            "resourceType": "Observation",
            "status": "preliminary",
            "code": {"text": label},
            **common,
            "device": {"reference": device},
            "note": notes,
            **_value(result, column),
        }
        for column, label in result.labels.items()
    }
    versions = [{"type": {"text": "software"}, "value": version}]
    versions += [{"type": {"text": "sha256 of the model"}, "value": sha256} for sha256 in result.sha256]
    resources = {
        report: {
            "resourceType": "DiagnosticReport",
            "status": "preliminary",
            "code": {"text": f"Prediction of {result.column} from resting-state BOLD"},
            **common,
            "result": [{"reference": address} for address in observations],
            "conclusion": " ".join((*result.remarks, result.intended_use)),
        },
        **observations,
        device: {
            "resourceType": "Device",
            "deviceName": [{"name": name, "type": "model-name"}],
            "version": versions,
        },
    }
    for resource in resources.values():
        check(resource)
    made_of = [{"fullUrl": address, "resource": resource} for address, resource in resources.items()]
    whole = {"resourceType": "Bundle", "type": "collection", "entry": made_of}
    check(whole)
    return whole


def _address(result: Result, made: datetime | None, *words: str) -> str:
    """An address that is the same for the same result."""
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([result.content(), str(made), *words]))}"


def _value(result: Result, column: str) -> dict[str, Any]:
    if result.absent:
        return {"dataAbsentReason": {"coding": [{"system": ABSENT, "code": result.absent}], "text": result.remarks[0]}}
    unit = {"system": "http://unitsofmeasure.org", "code": "1"} if result.probability else {}
    return {"valueQuantity": {"value": result.values[column], **unit}}


def check(resource: Mapping[str, Any]) -> None:
    """Check a resource by fhir.resources, and its status, of which that package takes any word.

    Raises:
        InputError: it is not valid; what of it is named.
    """
    from fhir.resources.R4B import get_fhir_model_class
    from pydantic import ValidationError

    kind = resource["resourceType"]
    try:
        get_fhir_model_class(kind).model_validate(resource)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"its {kind} is no valid FHIR R4B: {place}: {first['msg']}") from None
    if kind in STATUS and resource["status"] not in STATUS[kind]:
        raise InputError(f"its {kind} is no valid FHIR R4B: status {resource['status']!r} is none of FHIR's")
    for entry in resource.get("entry", ()):
        check(entry["resource"])
