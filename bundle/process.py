"""Run this bundle's configs as a user would, each in a process of its own."""

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bundle.errors import InputError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
_LEASH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; checkpoints are written whole or not at all
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that started this one has ended")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def on_a_leash(*arguments: str) -> list[str]:
    """Command that runs Python with some arguments, and is killed when the thread that starts it ends (on Linux)."""
    return [sys.executable, "-c", _LEASH, str(os.getpid()), *arguments]


@contextmanager
def locked(path: Path, patience_s: float = 5.0) -> Iterator[int]:
    """Hold an exclusive lock on a file, made if absent; give its file descriptor.

    The lock is ``flock``'s: it ends with the processes that hold the descriptor, however they end, so that none is ever
    left behind. A process that the descriptor is passed to holds the lock too, even if it outlives the one that took
    it. It keeps out the threads and processes of this machine. It keeps out those of other machines where the file
    system carries locks between them, as NFS on Linux does unless mounted with ``nolock`` or ``local_lock``.

    Args:
        path: the file; it stays, empty, since deleting it would free the name while another waits for it.
        patience_s: wait as long, in seconds, for a process that is just being killed.

    Raises:
        InputError: another process holds the lock, or the file system has none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise InputError(f"{path} is locked by a process at work; run again when it has ended") from error
                time.sleep(0.1)
            except OSError as error:
                raise InputError(
                    f"{path} cannot be locked ({error.strerror}); use a folder on a file system with locks"
                ) from error
        yield file.fileno()


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


def run_bundle(
    run_id: str,
    configs: Sequence[str],
    overrides: Mapping[str, Any],
    log: Path | None = None,
    lock: int | None = None,
    directory: str | Path | None = None,
) -> None:
    """Run ``python -m monai.bundle run RUN_ID`` on some configs, of which later ones win.

    On Linux the process ends with the one that called this.

    Args:
        run_id: the entry to run: ``run``, or ``pretrain`` of pretrain.json.
        configs: names or paths, as for `config_file`.
        overrides: config id to value, as on the command line.
        log: append what the process writes to this file, instead of showing it.
        lock: descriptor of a lock that the process holds too; see `locked`.
        directory: working directory of the process, from which it takes relative paths; None: this one's.

    Raises:
        InputError: there is no such directory, or it did not finish; its log says why.
    """
    files = [str(config_file(name)) for name in configs]
    command = on_a_leash("-m", "monai.bundle", "run", run_id)
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
