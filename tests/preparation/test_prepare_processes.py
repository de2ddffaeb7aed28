"""Preparing a dataset in processes that are many, or killed: the same store as by one that ends."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from small_runs import run_of, save_three_and_a_truncated_one, status_of

from bundle import workers
from bundle.errors import InputError
from bundle.preparation import store
from bundle.preparation.prepare import prepare


@pytest.fixture
def files(tmp_path):
    return save_three_and_a_truncated_one(tmp_path)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from small_runs import run_of
from bundle.preparation.prepare import prepare
folder = Path(sys.argv[2])
prepare([run_of(folder / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "b", "c")], folder / "store")
"""


def test_killed_in_the_middle_the_store_is_valid_and_running_again_goes_on(files):
    here = str(Path(__file__).resolve().parents[1] / "helpers")
    process = subprocess.Popen([sys.executable, "-c", KILLED, here, str(files)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (files / "store/runs/sub-a").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.read_manifest(files / "store")
    assert all(store.is_intact(files / "store", record) for record in store.read_records(files / "store").values())
    runs = [run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "b", "c")]
    summary = prepare(runs, files / "store")
    assert status_of(summary)["sub-a"] == "current"
    assert summary["failed"] == 0
    assert sorted(path.name for path in (files / "store/runs").iterdir()) == ["sub-a", "sub-b", "sub-c"]


def contents(folder):
    """Every file of a store, as bytes by path; less what it remembers of files' times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".seen-")]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_many_processes_give_what_one_gives_to_the_byte(files):
    runs = [run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "cut", "b")]
    one = prepare(runs, files / "one" / "store")
    assert prepare(runs, files / "two" / "store", workers=2) == one
    assert contents(files / "two") == contents(files / "one")


def test_dask_gives_what_one_process_gives_to_the_byte(files):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed; pip install distributed")
    runs = [run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "cut", "b")]
    one = prepare(runs, files / "one" / "store")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None
    ) as cluster:
        assert prepare(runs, files / "dask" / "store", scheduler=cluster.scheduler_address) == one
    assert contents(files / "dask") == contents(files / "one")


def test_a_scheduler_that_does_not_answer_is_said_plainly(files):
    pytest.importorskip("distributed", reason="Dask is not installed; pip install distributed")
    with pytest.raises(InputError, match=r"no Dask scheduler answers at nonsense://1"):
        prepare([run_of(files / "a.nii.gz", "sub-a")], files / "store", scheduler="nonsense://1")


class DyingPool(ThreadPoolExecutor):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def map(self, *args):
        raise BrokenProcessPool("a process was terminated abruptly")


def test_a_killed_worker_is_said_plainly(files, monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", DyingPool)
    with pytest.raises(InputError, match="fewer workers"):
        prepare([run_of(files / "a.nii.gz", "sub-a")], files / "store", workers=2)
