"""The applied model card answers every element of CHAI's schema, v0.2 (https://mc.chai.org/v0.2/schema.xsd)."""

from pathlib import Path

import pytest

CARD = Path(__file__).resolve().parents[2] / "docs" / "applied_model_card.md"
ELEMENTS = [
    "ModelName",
    "ModelDeveloper",
    "DeveloperContact",
    "ReleaseStage",
    "ReleaseDate",
    "ReleaseVersion",
    "GlobalAvailability",
    "EHRCompatibility",
    "RegulatoryApproval",
    "Summary",
    "Keywords",
    "IntendedUseAndWorkflow",
    "PrimaryIntendedUsers",
    "HowToUse",
    "TargetedPatientPopulation",
    "CautionedOutOfScopeSettings",
    "KnownRisksAndLimitations",
    "KnownBiasesOrEthicalConsiderations",
    "ClinicalRiskLevel",
    "OutcomesAndOutputs",
    "ModelType",
    "FoundationModels",
    "InputDataSource",
    "OutputAndInputDataTypes",
    "DevelopmentDataCharacterization",
    "BiasMitigationApproaches",
    "OngoingMaintenance",
    "Security",
    "Transparency",
    "FundingSource",
    "ThirdPartyInformation",
    "StakeholdersConsulted",
    "EvaluationReferences",
    "ClinicalTrial",
    "PeerReviewedPublications",
    "ReimbursementStatus",
    "PatientConsentOrDisclosure",
]
OF_METRICS = ("Goal", "Result", "Interpretation", "Typeoftest", "Testingdata", "Validationprocessandjustification")


def rows() -> dict[str, list[str]]:
    """First cell, without blanks and marks, to the others."""
    lines = [line.strip("| ").split(" | ") for line in CARD.read_text().splitlines() if line.startswith("| ")]
    return {"".join(filter(str.isalnum, first)).lower(): others for first, *others in lines}


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_element_has_an_answer(element: str):
    (answer,) = rows()[element.lower()]
    assert len(answer) > 3


@pytest.mark.parametrize("element", OF_METRICS)
def test_each_of_the_three_key_metrics_has_it(element: str):
    answers = rows()[element.lower()]
    assert len(answers) == 3
    assert all(len(answer) > 3 for answer in answers)


def test_what_was_never_validated_says_so():
    assert all("not validated" in answer for answer in rows()["validationprocessandjustification"])
