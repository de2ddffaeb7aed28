"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
torch.set_num_threads(1)  # tests run in parallel processes; see the README's test command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the repository; it is not part of the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "README.md").is_file():
        pytest.skip("reference material is absent: there is no folder shared/ beside the repository")
    return folder
