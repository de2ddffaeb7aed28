"""Processes and locks that end with whoever needs them, tried with real processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bundle.errors import InputError
from bundle.files import ROOT
from bundle.locks import locked
from bundle.process import run_config

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def start(code: str, *arguments: object) -> tuple[subprocess.Popen, int]:
    """A Python process that is told to print a process's id, and that id."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_process_takes_relative_paths_from_the_directory_it_is_given(tmp_path):
    (tmp_path / "here").mkdir()
    copy = {"_target_": "shutil.copyfile", "src": "@file", "dst": "copy.json"}
    (tmp_path / "run.json").write_text(json.dumps({"file": "absent.json", "run": [copy]}))
    run_config(
        "run", [str(tmp_path / "run.json")], {"file": "../run.json"}, tmp_path / "log.txt", directory=tmp_path / "here"
    )
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["copy.json"]
    with pytest.raises(InputError, match=r"gone is not seen from this machine"):
        run_config("run", [str(tmp_path / "run.json")], {}, directory=tmp_path / "gone")


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between opening and reading
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie has ended


ALONE = """import subprocess; from bundle.process import ends_with_parent
subprocess.run(ends_with_parent('-c', sys.argv[1]))"""
POOL = """from bundle.workers import parallel_map
with parallel_map(2, None) as each:
    each(exec, [sys.argv[1]], 'sleepers')"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("code", [ALONE, POOL], ids=["training", "worker"])
def test_a_process_ends_with_the_one_that_started_it(code: str):
    parent, child = start(code, SLEEP)
    assert alive(child)
    assert child != parent.pid
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_a_lock_is_held_by_each_process_it_was_passed_to_and_ends_with_the_last(tmp_path):
    code = """import subprocess; from pathlib import Path; from bundle.locks import locked
with locked(Path(sys.argv[1])) as lock:
    subprocess.run([sys.executable, '-c', sys.argv[2]], pass_fds=[lock])"""
    path = tmp_path / "new" / "cell.lock"
    parent, child = start(code, path, SLEEP)
    for pid in (parent.pid, child):
        with pytest.raises(InputError, match=r"cell.lock is locked by a process at work"), locked(path, 0):
            pass
        os.kill(pid, signal.SIGKILL)
        parent.wait()
    with locked(path), pytest.raises(InputError, match="is locked"), locked(path, 0):  # in this process too
        pass
    with locked(path):
        pass


def test_a_lock_that_is_about_to_be_released_is_waited_for(tmp_path):
    code = """import os, time; from pathlib import Path; from bundle.locks import locked
with locked(Path(sys.argv[1])):
    print(os.getpid(), flush=True)
    time.sleep(0.5)"""
    holder, _ = start(code, tmp_path / "a")
    with locked(tmp_path / "a", 60):
        assert holder.wait() == 0
