"""Run this bundle's configs as a user would, each in a process of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bundle.errors import InputError
from bundle.files import ROOT, config_file

logger = logging.getLogger(__name__)

_END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; checkpoints are written whole or not at all
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that started this one has ended")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def ends_with_parent(*arguments: str) -> list[str]:
    """Command that runs Python with some arguments, and is killed when the thread that starts it ends (on Linux)."""
    return [sys.executable, "-c", _END_WITH_PARENT, str(os.getpid()), *arguments]


def run_config(
    run_id: str,
    configs: Sequence[str],
    overrides: Mapping[str, Any],
    log: Path | None = None,
    lock: int | None = None,
    directory: str | Path | None = None,
) -> None:
    """Run `python -m monai.bundle run RUN_ID` on some configs, of which later ones win.

    On Linux the process ends with the one that called this.

    Args:
        run_id: the entry to run: `run`, or `pretrain` of pretrain.json.
        configs: names or paths, as for `config_file`.
        overrides: config id to value, as on the command line.
        log: append what the process writes to this file, instead of showing it.
        lock: descriptor of a lock that the process holds too; see `locked`.
        directory: working directory of the process, from which it takes relative paths; None: this one's.

    Raises:
        InputError: there is no such directory, or it did not finish; its log says why.
    """
    files = [str(config_file(name)) for name in configs]
    command = ends_with_parent("-m", "monai.bundle", "run", run_id)
    command += ["--config_file", str(files), "--meta_file", str(ROOT / "configs" / "metadata.json")]
    command += ["--logging_file", str(ROOT / "configs" / "logging.conf"), "--bundle_root", str(ROOT)]
    for name, value in overrides.items():
        command += [f"--{name}", str(value)]
    logger.info("python %s", " ".join(command[4:]))
    # idle OpenMP threads that spin for long slow the scan many times on a machine that does other work too
    environment = {"GOMP_SPINCOUNT": "1000"} | os.environ
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    if directory is not None and not Path(directory).is_dir():
        raise InputError(f"{directory} is not seen from this machine; start the sweep in a folder that workers see too")
    kept = () if lock is None else (lock,)
    with nullcontext() if log is None else log.open("ab") as file:
        status = subprocess.run(
            command, env=environment, check=False, stdout=file, stderr=file, pass_fds=kept, cwd=directory
        ).returncode
    if status != 0:
        raise InputError(f"{Path(files[0]).name} did not finish (status {status}); {log or 'its log'} says why")
