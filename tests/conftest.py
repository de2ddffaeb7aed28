"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from ignite.utils import manual_seed
from small_runs import coarse_signal, save_derivatives

from bundle.data.splits import make_splits, save_splits
from bundle.networks import compiled
from bundle.preparation.prepare import prepare
from bundle.preparation.sources import find_runs
from bundle.preparation.store import read_manifest

os.environ.setdefault("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
torch.set_num_threads(1)  # tests run in parallel processes; see the README's test command
hypothesis.settings.register_profile("same examples, however long they take", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same examples, however long they take")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that fails fails in every run: weights drawn in a test do not depend on what ran before it."""
    manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _plain_scan() -> Iterator[None]:
    """Tests, and fixtures of any scope, see the plain scan also where the compiled one is installed.

    test_compiled_scan.py builds its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the repository; it is not part of the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "README.md").is_file():
        pytest.skip("reference material is absent: there is no folder shared/ beside the repository")
    return folder


@pytest.fixture(scope="session")
def derivatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fMRIPrep-like derivatives of 12 participants: two sites, cases and controls, 30 frames of noise each."""
    folder = tmp_path_factory.mktemp("derivatives")
    rows = ["participant_id\tsite\tdiagnosis"]
    for i in range(12):
        name = f"sub-{i:02d}"
        save_derivatives(folder, name, coarse_signal(seed=i))
        rows.append(f"{name}\t{'north' if i < 6 else 'south'}\t{'adhd' if i % 2 else 'control'}")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def store(derivatives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The derivatives, prepared, with a split file of three folds in it."""
    folder = tmp_path_factory.mktemp("store")
    summary = prepare(find_runs(derivatives), folder)
    assert summary["prepared"] == 12
    save_splits(make_splits(read_manifest(folder)["runs"], folds=3), folder / "splits.json")
    return folder
