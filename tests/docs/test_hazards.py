"""The page of hazards: the tests that it points to are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "hazards.md").read_text().splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_hazard_is_met_by_tests_that_exist(row):
    named = re.findall(r"`(tests/[^`]+)`", row)
    assert named
    for name in named:
        place = ROOT / name
        assert place.is_file() or any(place.glob("test_*.py")), name
