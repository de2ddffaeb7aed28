"""A plain installation, not an editable one, works from any folder: configs and templates come with it.

Not covered: that the dependencies can be installed, which CI's first step shows.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_configs import ROOT, TINY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the project, from a copy, as it leaves files in the source."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("bundle", "configs", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_config_and_template_is_installed(installed: Path):
    for folder, kinds in (("configs", ("*.json", "*.conf")), ("bundle", ("*.j2",))):
        for kind in kinds:
            wanted = {path.relative_to(ROOT) for path in (ROOT / folder).rglob(kind)}
            assert wanted
            assert {path.relative_to(installed) for path in (installed / folder).rglob(kind)} == wanted


def test_it_works_from_a_foreign_folder(installed: Path, derivatives: Path, store: Path, tmp_path: Path):
    where = run(installed, tmp_path, "scripts", "where").strip()
    assert where == str(installed)
    bundle = ["--bundle_root", where]
    one = next(derivatives.glob("sub-00/func/*_bold.nii.gz"))
    prepare = ["monai.bundle", "run", "prepare", "--config_file", f"{where}/configs/prepare.json", *bundle]
    run(installed, tmp_path, *prepare, "--dataset_dir", str(one), "--output_dir", "store", "--labels", "optional")
    assert (tmp_path / "store" / "report.html").is_file()
    pretrain = ["monai.bundle", "run", "pretrain", "--config_file", f"{where}/configs/pretrain.json", *bundle]
    options = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    run(installed, tmp_path, *pretrain, "--dataset_dir", str(store), *options)
    assert (tmp_path / "output" / "pretrain" / "best.pt").is_file()  # below the folder it was started in
    assert not (installed / "output").exists()
