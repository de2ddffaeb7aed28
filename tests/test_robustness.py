"""Preparing under bad luck: killed anywhere, twice at once, no space, no permission; the store ends the same.

Not covered here: which runs fail and why (test_prepare.py), damaged arrays (test_store.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import coarse_signal, run_of, save_bold

from bundle.errors import InputError
from bundle.files import WriteError
from bundle.preparation.prepare import prepare

# The imports take longest, so one process with everything imported forks a child for each preparation.
FORKING = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from small_runs import run_of
from bundle.anatomy import atlas
from bundle.anatomy import grid
from bundle.preparation.prepare import prepare

folder, job = Path(sys.argv[2]), sys.argv[3]
atlas.labels_on(atlas.load_atlas(), grid.AFFINE, grid.SHAPE), grid.mni_brain()
runs = [run_of(folder / f"{name}.nii.gz", f"sub-{name}") for name in "abcd"]

def child():
    pid = os.fork()
    if pid == 0:
        prepare(runs, folder / job / "store")
        os._exit(0)
    return pid

if job == "killed":
    rng = random.Random(0)
    for _ in range(12):
        pid = child()
        time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    children = [child()]
else:
    children = [child(), child(), child()]
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
"""


def contents(folder):
    """All bytes, but for what is remembered of files' times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".seen-")]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four runs, of which one is damaged, and the store that an undisturbed preparation makes."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("abcd"):
        save_bold(folder / f"{name}.nii.gz", coarse_signal(24, seed), tr=2.0)
    damaged = folder / "c.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:100_000])
    summary = prepare([run_of(folder / f"{name}.nii.gz", f"sub-{name}") for name in "abcd"], folder / "calm" / "store")
    assert (summary["prepared"], summary["failed"]) == (3, 1)
    return folder


def run_job(files, job):
    here = Path(__file__).parent / "helpers"
    environment = os.environ | {"PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORKING, str(here), str(files), job]
    subprocess.run(command, env=environment, check=True, timeout=200)


def records_only(files):
    """A store without what tells how often it was prepared: the summary and the report say "current" on a rerun."""
    return {path: content for path, content in files.items() if path.name not in ("summary.tsv", "report.html")}


def test_killed_at_random_points_it_ends_with_the_identical_store(files):
    run_job(files, "killed")
    killed, calm = contents(files / "killed"), contents(files / "calm")
    assert records_only(killed) == records_only(calm)  # also: nothing unfinished is left
    prepare([run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in "abcd"], files / "killed" / "store")
    prepare([run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in "abcd"], files / "calm" / "store")
    assert contents(files / "killed") == contents(files / "calm")


def test_three_processes_on_one_store_leave_the_store_that_one_leaves(files):
    run_job(files, "together")
    assert records_only(contents(files / "together")) == records_only(contents(files / "calm"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_while_any_file_is_written_is_said_and_leaves_nothing(files, tmp_path, monkeypatch):
    run = run_of(files / "a.nii.gz", "sub-a")
    opened = Path.open
    for name in ("frames.npy", "run.json", "manifest.json", "summary.tsv"):

        def full(path, *arguments, _name=name, **options):
            writes = any("w" in str(argument) for argument in (*arguments, options.get("mode", "")))
            unfinished = path.name.startswith(".unfinished") and _name in ("manifest.json", "summary.tsv")
            target = Path("/dev/full") if writes and (path.name == _name or unfinished) else path
            return opened(target, *arguments, **options)

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(WriteError, match=r"No space left on device.*free space or choose another folder"):
            prepare([run], tmp_path / name)
        monkeypatch.setattr(Path, "open", opened)
        left = [path.name for path in (tmp_path / name).rglob("*") if path.name.startswith(".unfinished")]
        assert left == []
        assert prepare([run], tmp_path / name)["failed"] == 0


def test_a_store_that_cannot_be_written_is_said(files, tmp_path):
    (tmp_path / "store").write_text("a file where the folder should be")  # holds for root too, unlike permissions
    with pytest.raises(InputError, match="cannot be written"):
        prepare([run_of(files / "a.nii.gz", "sub-a")], tmp_path / "store")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_store_is_said(files, tmp_path):
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(WriteError, match="Permission denied"):
        prepare([run_of(files / "a.nii.gz", "sub-a")], tmp_path / "store")
