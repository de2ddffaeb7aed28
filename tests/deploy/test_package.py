"""Packages for the model zoo: what its CI asks for, run where this repository is not.

The rules are those of Project-MONAI/model-zoo: CONTRIBUTING.md, ci/verify_bundle.py, setup.cfg and runtests.sh.
Not covered: the schema of metadata, which is downloaded (tests/configs look at its keys), and TensorRT.
"""

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest
from monai.bundle import download
from released import SIZE, released, shaken
from tasks import BINARY, subjects_of

from bundle.deploy import package as module
from bundle.deploy.package import LARGEST, package
from bundle.deploy.release import ReleasedModel
from bundle.errors import InputError
from bundle.evaluation.subjects import write_test_scores
from bundle.files import ROOT, file_sha256, metadata, write_json
from bundle.heads.mean import Classifier
from bundle.training.checkpoints import weights_sha256

NAME = "brain_fmri_synthetic_test"
DATA = "SYNTHETIC: noise."
FLAKE8 = ["--select=B,C,E,F,N,P,T4,W,B9", "--max-line-length=120", "--ignore=E203,E501,E741,W503,W504,C408,N812,B023"]
FLAKE8 += ["--per-file-ignores=__init__.py:F401,__main__.py:F401"]
STYLE = {"black": ["--check", "--skip-magic-trailing-comma", "-l120"], "isort": ["--check", "--profile=black", "-l120"]}


@pytest.fixture(scope="module")
def model(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released(tmp_path_factory.mktemp("released"), store, shaken(Classifier(**SIZE, hidden=3)), {"hidden": 3})


@pytest.fixture(scope="module")
def evaluation(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of six test subjects, of which one is on the wrong side."""
    folder = tmp_path_factory.mktemp("evaluation")
    validation, tested = (subjects_of([0, 0, 0, 1, 1, 1], [-3, -2, 2, 1, 2, 3]) for _ in range(2))
    weights = weights_sha256(ReleasedModel(model).members[0].state)
    write_test_scores(BINARY, validation, tested, folder, resamples=50, weights=weights)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("black", "isort", "flake8"):
        pytest.importorskip(tool, reason=f"{tool} is not installed; pip install -e .[zoo]")
    out = tmp_path_factory.mktemp("out")
    package(model, out, evaluation, NAME, DATA, "python -m scripts example", "A synthetic test")
    return out


def folder_of(made: Path) -> Path:
    return made / f"{NAME}_v{metadata()['version']}"


def test_the_package_holds_what_the_zoo_asks_for_and_nothing_else(made: Path, evaluation: Path, model: Path):
    folder = folder_of(made)
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md"):
        assert (folder / name).is_file(), name
    assert (folder / "models" / "model.pt").read_bytes() == model.read_bytes()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert all(path.stat().st_size <= LARGEST for path in files)
    assert {path.suffix for path in files if path.parent.name != "models"} <= module.SUFFIXES | {""}
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["model.json", "model.pt", "reference.pt"]
    assert {path.name for path in folder.iterdir()} == {*module.FOLDERS, "models", "tests", "LICENSE"}

    about = json.loads((folder / "configs" / "metadata.json").read_text())
    assert about["version"] in about["changelog"]
    assert about["name"] == "A synthetic test"
    scores = json.loads((evaluation / "scores.json").read_text())["scores"]
    assert about["eval_metrics"]["data"] == about["data_source"] == DATA
    assert about["eval_metrics"]["auroc"] == scores["auroc"]["value"] == pytest.approx(7.5 / 9)
    assert about["network_data_format"]["inputs"]["image"]["spatial_shape"] == [96, 96, 96, 2]
    for name in ("inference", "train"):  # keys that CONTRIBUTING wants
        config = json.loads((folder / "configs" / f"{name}.json").read_text())
        assert {"bundle_root", "device", "network_def", "inferer", "output_dir"} <= set(config)
        assert config["embed_dim"] == 4
        assert config["network_def"]["hidden"] == 3

    card = (folder / "docs" / "README.md").read_text()
    for word in (
        "Authors",
        "Tags",
        "System Configuration",
        "TensorRT",
        "TorchScript",
        DATA,
        "0.833",
        "scripts example",
    ):
        assert word in card, word
    assert "No trained weights" not in card
    record = (folder / "models" / "model.json").read_text()
    assert not any(f"{place}/" in record for place in (tempfile.gettempdir(), Path.home(), ROOT.parent, ROOT))
    assert not re.search(r"(?<![\w.])/\w+/", record)  # a path from the root of any machine


def test_checksums_are_of_the_zip_whose_top_folder_is_the_bundle(made: Path):
    path = made / f"{folder_of(made).name}.zip"
    (info,) = json.loads((made / "model_info.json").read_text()).values()
    assert info["checksum"] == hashlib.sha1(path.read_bytes()).hexdigest()
    assert (made / f"{path.name}.sha256").read_text() == f"{file_sha256(path)}  {path.name}\n"
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {NAME}
        files = [file for file in folder_of(made).rglob("*") if file.is_file()]
        assert len(archive.namelist()) == len(files)
    before = path.read_bytes()
    for file in files:
        file.touch()
    module._zip(folder_of(made), NAME, path)
    assert path.read_bytes() == before


def test_the_code_has_the_style_of_the_zoo(made: Path):
    for tool, options in STYLE.items():
        done = subprocess.run([sys.executable, "-m", tool, *options, "."], cwd=folder_of(made), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    done = subprocess.run([sys.executable, "-m", "flake8", *FLAKE8, "."], cwd=folder_of(made), capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-2000:]


def test_its_own_test_passes_where_nothing_of_the_repository_is(made: Path, tmp_path: Path):
    """Downloaded from a URL, with an interpreter that sees the installed packages but not this one."""
    (tmp_path / "bundles").mkdir()
    url = (made / f"{folder_of(made).name}.zip").as_uri()
    download(NAME, url=url, bundle_dir=tmp_path / "bundles", progress=False)
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth, as of this project, are not read
    python = tmp_path / "venv" / "bin" / "python"
    elsewhere = subprocess.run([python, "-c", "import bundle"], cwd=tmp_path, capture_output=True)
    assert b"No module named 'bundle'" in elsewhere.stderr
    command = [python, tmp_path / "bundles" / NAME / "tests" / "test_bundle.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Ran 3 tests" in done.stderr


def test_what_must_not_leave_is_refused(
    model: Path, evaluation: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(words: str, **changes: object) -> None:
        given = {"model": model, "out": tmp_path / "out", "evaluation": evaluation, "name": NAME, "data": DATA}
        with pytest.raises(InputError, match=words):
            package(**(given | {"command": "make"} | changes))
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    refused("must be small letters", name="My Bundle")
    refused("says synthetic, so --name must say it too", name="brain")
    other = released(tmp_path / "other", store, shaken(Classifier(**SIZE)))
    refused("is of other weights than", model=other)
    refused("absent; test the model", evaluation=tmp_path)
    record = json.loads(other.with_suffix(".json").read_text())
    record["config"]["encoder_checkpoint"] = "/home/someone/best.pt"
    write_json(other.with_suffix(".json"), record)
    refused(r"config#encoder_checkpoint is a path of a machine", model=other)
    monkeypatch.setattr(module, "ISORT", ["no_such_tool"])
    refused(r"no_such_tool did not format the package .* install it with `pip install -e \"\.\[zoo\]\"`")


def test_data_and_predictions_that_lie_about_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "root"
    for name in ("bundle/a.py", "configs/b.json", "docs/README.md", "scripts/c.py", "LICENSE"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    strays = [
        "docs/predictions.tsv",
        "configs/sub-1_bold.nii.gz",
        "bundle/x.pt",
        "bundle/__pycache__/a.py",
        "demo/d.py",
    ]
    for name in [*strays, "output/run.json", "docs/.hidden/e.md", "predictions.json"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("someone")
    (root / "docs" / "link.md").symlink_to(root / "predictions.json")
    monkeypatch.setattr(module, "ROOT", root)
    module._copy_code(tmp_path / "copy")
    found = {
        path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert found == {"bundle/a.py", "configs/b.json", "docs/README.md", "scripts/c.py", "LICENSE"}
