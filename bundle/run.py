"""Run this bundle's configs as a user would, each in a process of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bundle.errors import InputError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]


def config_file(name: str) -> Path:
    """Path of a config of this bundle (``"pretrain"``, ``"masks/limbic"``) or of a JSON file elsewhere.

    Raises:
        InputError: there is no such file.
    """
    path = Path(name) if name.endswith(".json") else ROOT / "configs" / f"{name}.json"
    if not path.is_file():
        known = sorted(str(p.relative_to(ROOT / "configs"))[:-5] for p in (ROOT / "configs").rglob("*.json"))
        raise InputError(f"{path}: no such config; give a path that ends in .json, or one of {', '.join(known)}")
    return path.resolve()


def run_bundle(run_id: str, configs: Sequence[str], overrides: Mapping[str, Any], log: Path | None = None) -> None:
    """Run ``python -m monai.bundle run RUN_ID`` on some configs, of which later ones win.

    Args:
        run_id: the entry to run: ``run``, or ``pretrain`` of pretrain.json.
        configs: names or paths, as for `config_file`.
        overrides: config id to value, as on the command line.
        log: append what the process writes to this file, instead of showing it.

    Raises:
        InputError: it did not finish; its log says why.
    """
    files = [str(config_file(name)) for name in configs]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id]
    command += ["--config_file", str(files), "--meta_file", str(ROOT / "configs" / "metadata.json")]
    command += ["--logging_file", str(ROOT / "configs" / "logging.conf"), "--bundle_root", str(ROOT)]
    for name, value in overrides.items():
        command += [f"--{name}", str(value)]
    logger.info("%s", " ".join(command))
    # idle OpenMP threads that spin for long slow the scan many times on a machine that does other work too
    environment = {"GOMP_SPINCOUNT": "1000"} | os.environ
    if log is None:
        status = subprocess.run(command, env=environment, check=False).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            status = subprocess.run(command, env=environment, check=False, stdout=file, stderr=file).returncode
    if status != 0:
        raise InputError(f"{configs[0]}.json did not finish (status {status}); {log or 'its log'} says why")
