"""The store: round trips, clips read alone, runs whole or absent, two writers, full disks.

Pitfalls 4 and 6. Not covered here: what is put in (test_prepare.py).
"""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bundle import files
from bundle.errors import InputError
from bundle.files import WriteError, file_sha256, write_json, write_text
from bundle.preparation import store

PARAMETERS = ({"tr": 0.8}, "hash")
read_json = store._read_json


def make_run(run_id="sub-01", frames=50, voxels=200, seed=0, **more):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(frames, voxels)).astype(np.float16)
    places = np.sort(rng.choice(96**3, voxels, replace=False))
    record = {"run_id": run_id, "frames": frames, "voxels": voxels, "parameters_hash": "hash", "fill": -3.5} | more
    return record, z, places, rng.normal(1000, 50, (2, voxels))


def test_a_run_comes_back_as_written(tmp_path):
    record, z, places, moments = make_run()
    store.write_run(tmp_path, record, z, places, moments)
    assert store.read_run(tmp_path, "sub-01") == record
    assert np.array_equal(store.read_voxels(tmp_path, "sub-01"), places)
    assert np.array_equal(store.read_moments(tmp_path, "sub-01"), moments)  # float64, as computed
    values = z[7:9].astype(float) * moments[1] + moments[0]
    np.testing.assert_allclose(store.read_values(tmp_path, "sub-01", 7, 2), values, rtol=1e-6)
    assert store.count_frames(tmp_path, "sub-01") == 50
    for start, frames in ((0, 50), (0, 20), (7, 20), (30, 20), (49, 1)):
        clip = store.read_clip(tmp_path, "sub-01", start, frames)
        assert clip.dtype == np.float16
        assert np.array_equal(clip, z[start : start + frames])
    assert np.array_equal(np.load(tmp_path / "runs/sub-01/frames.npy"), z)  # plain .npy for everyone else
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sub-01"]


def test_a_clip_reads_only_its_frames(tmp_path):
    record, z, places, moments = make_run(frames=2000, voxels=5000)
    store.write_run(tmp_path, record, z, places, moments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    clip = store.read_clip(tmp_path, "sub-01", 1000, 20)
    assert clip.base is None  # a copy: the file can go away
    touched = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
    assert touched < z.nbytes / 4


@pytest.mark.parametrize(("start", "frames"), [(-1, 20), (31, 20), (0, 51), (0, 0), (0, -5)])
def test_frames_that_are_not_there_are_refused(tmp_path, start, frames):
    store.write_run(tmp_path, *make_run())
    with pytest.raises(InputError, match="has 50 frames"):
        store.read_clip(tmp_path, "sub-01", start, frames)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(InputError, match="not a finished store"):
        store.read_manifest(tmp_path)
    store.write_manifest(tmp_path, *PARAMETERS)
    for read in (store.read_run, store.read_voxels, store.count_frames):
        with pytest.raises(InputError, match="holds no run sub-09"):
            read(tmp_path, "sub-09")


@pytest.mark.parametrize("run_id", ["", "..", ".hidden", "a/b", "a b", "sub-01\n", "ä"])
def test_run_ids_that_are_no_folder_names_are_refused(tmp_path, run_id):
    with pytest.raises(InputError, match="run id"):
        store.write_run(tmp_path, *make_run(run_id))


def test_manifest_lists_what_is_there(tmp_path):
    for run_id in ("sub-02", "sub-01"):
        store.write_run(tmp_path, *make_run(run_id))
    written = store.write_manifest(tmp_path, *PARAMETERS)
    manifest = store.read_manifest(tmp_path)
    assert manifest == written
    assert manifest["format"] == 2
    assert manifest["parameters"] == {"tr": 0.8}
    assert [run["run_id"] for run in manifest["runs"]] == ["sub-01", "sub-02"]


def test_a_run_that_another_process_finishes_meanwhile_is_in_the_manifest(tmp_path, monkeypatch):
    def slow(path, text):
        if not (tmp_path / "runs" / "b").exists():
            store.write_run(tmp_path, *make_run("b"))
        write_text(path, text)

    store.write_run(tmp_path, *make_run("a"))
    monkeypatch.setattr(store, "write_text", slow)
    store.write_manifest(tmp_path, {}, "hash")
    assert [run["run_id"] for run in store.read_manifest(tmp_path)["runs"]] == ["a", "b"]


@pytest.fixture
def all_settled(monkeypatch):
    """Files count as unchanged by their stamps at once, not after two seconds."""
    monkeypatch.setattr(files, "SETTLED_S", -1.0)


@given(
    seed=st.integers(0, 2**32 - 1),
    moves=st.lists(
        st.tuples(st.sampled_from(["write", "record", "remove", "damage", "forget", "manifest"]), st.integers(0, 3)),
        max_size=12,
    ),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_remembered_never_differs_from_what_is_there(tmp_path_factory, all_settled, seed, moves):
    """Truth: a copy of the folders without the remembered stamps, whose manifest is made of what each folder holds."""
    folder = tmp_path_factory.mktemp("store")
    for step, (move, number) in enumerate(moves):
        run_id = f"sub-{number}"
        there = (folder / "runs" / run_id).is_dir()
        if move == "write":
            store.write_run(folder, *make_run(run_id, frames=3, voxels=2, seed=seed, step="x" * (step + 20)))
        elif move == "record" and there:
            store.write_record(
                folder, {"run_id": run_id, "parameters_hash": "hash", "step": "x" * step}
            )  # no two of a size
        elif move == "remove":
            store.remove_run(folder, run_id)
        elif move == "damage" and there:
            (folder / "runs" / run_id / "run.json").write_text("{")
        elif move == "forget":
            (folder / ".seen-records.json").unlink(missing_ok=True)
        elif move == "manifest":
            store.write_manifest(folder, *PARAMETERS)
    there = {path.parent.name: path.read_text() for path in sorted((folder / "runs").glob("*/run.json"))}
    expected = {name: json.loads(text) for name, text in there.items() if text != "{"}
    assert store.read_records(folder) == expected
    assert store.write_manifest(folder, *PARAMETERS)["runs"] == list(expected.values())
    assert store.read_manifest(folder)["runs"] == list(expected.values())
    assert store.read_records(folder) == expected


def test_only_records_that_changed_are_read_again(tmp_path, all_settled, monkeypatch):
    for number in range(4):
        store.write_run(tmp_path, *make_run(f"sub-{number}"))
    store.write_manifest(tmp_path, *PARAMETERS)
    store.write_record(tmp_path, make_run("sub-2")[0] | {"site": "B"})
    read = []
    monkeypatch.setattr(store, "_read_json", lambda path, *more: read.append(path.name) or read_json(path, *more))
    before = (tmp_path / "manifest.json").read_bytes()
    assert store.write_manifest(tmp_path, *PARAMETERS)["runs"][2]["site"] == "B"
    assert read == ["manifest.json", "run.json"]
    (tmp_path / ".seen-records.json").unlink()
    remembered = (tmp_path / "manifest.json").read_bytes()
    store.write_manifest(tmp_path, *PARAMETERS)
    assert (tmp_path / "manifest.json").read_bytes() == remembered != before  # as if all had been read


def test_a_manifest_that_another_process_has_put_in_the_place_is_not_believed(tmp_path, all_settled):
    """As when one of two is killed between its manifest and what it remembers."""
    store.write_run(tmp_path, *make_run("sub-0"))
    store.write_manifest(tmp_path, *PARAMETERS)
    old = (tmp_path / "manifest.json").read_text()
    store.write_record(tmp_path, make_run("sub-0")[0] | {"site": "B"})
    store.write_manifest(tmp_path, *PARAMETERS)
    write_text(tmp_path / "manifest.json", old)
    assert store.read_records(tmp_path)["sub-0"]["site"] == "B"
    (tmp_path / ".seen-records.json").write_text('{"manifest"')
    assert store.read_records(tmp_path)["sub-0"]["site"] == "B"


def test_a_record_that_was_just_written_is_read_again(tmp_path):
    store.write_run(tmp_path, *make_run("sub-0"))
    store.write_manifest(tmp_path, *PARAMETERS)
    assert json.loads((tmp_path / ".seen-records.json").read_text())["runs"] == [["sub-0", None]]


REBUILD_FOREVER = """
import sys
from bundle import files
from bundle.preparation import store
files.SETTLED_S = -1.0
print("ready", flush=True)
while True:
    store.write_manifest(sys.argv[1], {"tr": 0.8}, "hash")
"""


def test_a_killed_rebuild_of_the_manifest_is_harmless(tmp_path):
    for number in range(30):
        store.write_run(tmp_path, *make_run(f"sub-{number:02d}", frames=2, voxels=2))
    store.write_manifest(tmp_path, *PARAMETERS)
    for turn in range(4):
        process = subprocess.Popen([sys.executable, "-c", REBUILD_FOREVER, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        store.write_record(tmp_path, make_run("sub-07")[0] | {"turn": turn})
        time.sleep(0.003 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(store.read_manifest(tmp_path)["runs"]) == 30
        assert store.read_records(tmp_path)["sub-07"]["turn"] == turn
        store.clean_unfinished(tmp_path)
        store.write_manifest(tmp_path, *PARAMETERS)
        assert store.read_manifest(tmp_path)["runs"][7]["turn"] == turn


def test_the_index_is_the_manifest_less_what_training_does_not_read(tmp_path):
    more = {"site": "A", "participant": {"age": 9}, "coverage": {"frontal": 1.0}, "versions": {"numpy": "2"}}
    for run_id in ("sub-1", "sub-2"):
        store.write_run(tmp_path, *make_run(run_id, **more))
    store.write_manifest(tmp_path, *PARAMETERS)
    index, whole = store.read_index(tmp_path), store.read_manifest(tmp_path)
    brief = [
        {key: run[key] for key in ("run_id", "frames", "parameters_hash", "site", "participant")}
        for run in whole["runs"]
    ]
    assert index == whole | {"runs": brief}
    assert store.read_index(tmp_path)["runs"] is index["runs"]  # read once
    store.write_record(tmp_path, make_run("sub-2")[0] | {"site": "B"})
    store.write_manifest(tmp_path, *PARAMETERS)
    assert store.read_index(tmp_path)["runs"][1]["site"] == "B"
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a finished store"):
        store.read_index(tmp_path)


def test_a_file_of_an_array_is_opened_once(tmp_path):
    store.write_run(tmp_path, *make_run())
    opened, watching = [], True
    sys.addaudithook(lambda event, args: watching and event == "open" and opened.append(str(args[0])))
    store.read_clip(tmp_path, "sub-01", 3, 20)
    store.read_moments(tmp_path, "sub-01")
    watching = False
    names = [name.rsplit("/", 1)[1] for name in opened if name.startswith(str(tmp_path))]
    assert names == ["frames.npy", "moments.npy"]


def test_mixed_parameters_and_other_formats_are_refused(tmp_path):
    store.write_run(tmp_path, *make_run())
    store.write_run(tmp_path, *make_run("sub-02", parameters_hash="other"))
    store.write_manifest(tmp_path, *PARAMETERS)
    with pytest.raises(InputError, match=r"mixes preparation parameters.*sub-02"):
        store.read_manifest(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(InputError, match="format 0"):
        store.read_manifest(tmp_path)


def test_damage_is_noticed(tmp_path):
    record, z, places, moments = make_run()
    store.write_run(tmp_path, record, z, places, moments)
    assert store.is_intact(tmp_path, record)
    frames = tmp_path / "runs/sub-01/frames.npy"
    whole = frames.read_bytes()
    for content in (whole[:-1], whole[:10], b""):
        frames.write_bytes(content)
        assert not store.is_intact(tmp_path, record)
        with pytest.raises(InputError, match="prepare that run again"):
            store.read_clip(tmp_path, "sub-01", 0, 20)
    frames.write_bytes(whole)
    (tmp_path / "runs/sub-01/voxels.npy").unlink()
    assert not store.is_intact(tmp_path, record)


def test_rewriting_replaces_the_run_and_a_record_alone_leaves_the_frames(tmp_path):
    store.write_run(tmp_path, *make_run(seed=0))
    record, z, places, moments = make_run(seed=1, frames=30)
    store.write_run(tmp_path, record, z, places, moments)
    assert np.array_equal(store.read_clip(tmp_path, "sub-01", 0, 30), z)
    store.write_record(tmp_path, record | {"site": "B"})
    assert store.read_run(tmp_path, "sub-01")["site"] == "B"
    assert np.array_equal(store.read_clip(tmp_path, "sub-01", 0, 30), z)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_full_disk_is_said_plainly_and_leaves_nothing(tmp_path):
    """A limit on file size stands in for a full disk: the kernel refuses the write itself."""
    store.write_run(tmp_path, *make_run("sub-00"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot be written .*free space") as caught:
            store.write_run(tmp_path, *make_run("sub-01", frames=500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["sub-00"]


def test_a_store_that_cannot_be_made_is_said_plainly(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match="cannot be written"):
        store.write_manifest(tmp_path / "file" / "store", *PARAMETERS)


def _write_often(folder, seed):
    for _ in range(500):  # a race: 30 rarely meet it
        store.write_run(folder, *make_run(seed=seed, frames=20 + seed))


def test_two_processes_writing_one_run_leave_one_of_the_two(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(tmp_path, seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    record = store.read_run(tmp_path, "sub-01")
    assert record["frames"] in (21, 22)
    expected = make_run(seed=record["frames"] - 20, frames=record["frames"])
    assert np.array_equal(store.read_clip(tmp_path, "sub-01", 0, record["frames"]), expected[1])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["sub-01"]


WRITE_FOREVER = """
import sys, numpy as np
from bundle.preparation import store
while True:
    for n in range(3):
        record = {"run_id": f"sub-0{n}", "frames": 400, "voxels": 5000, "parameters_hash": "hash"}
        store.write_run(sys.argv[1], record, np.full((400, 5000), n, np.float16), np.arange(5000), np.ones((2, 5000)))
        print(n, flush=True)
"""


def test_a_killed_writer_leaves_whole_runs_and_its_rubbish_is_cleaned(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE)
    for _ in range(4):
        writer.stdout.readline()
    while not list((tmp_path / "runs").glob(".unfinished*/frames.npy")):
        assert writer.poll() is None
        time.sleep(0.001)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    records = store.read_records(tmp_path)
    assert len(records) >= 2  # the one being replaced may be absent, never half there
    for run_id, record in records.items():
        assert store.is_intact(tmp_path, record)
        assert np.all(store.read_clip(tmp_path, run_id, 0, 400) == int(run_id[-1]))
    store.clean_unfinished(tmp_path)
    assert not list((tmp_path / "runs").glob(".*"))


def test_only_dead_processes_of_this_machine_are_cleaned_up_after(tmp_path):
    runs = tmp_path / "runs"
    host = os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        "live": f".unfinished@{host}@{os.getpid()}@a",
        "elsewhere": f".unfinished@not-{host}@{dead.pid}@a",
        "dead": f".unfinished@{host}@{dead.pid}@a",
    }
    for name in names.values():
        (runs / name).mkdir(parents=True)
        (runs / name / "run.json").write_text("{")
    store.clean_unfinished(tmp_path)
    assert {path.name for path in runs.iterdir()} == {names["live"], names["elsewhere"]}
    assert store.read_records(tmp_path) == {}


def test_hash_of_files_is_that_of_their_bytes_in_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 300_000)
    two.write_bytes(b"b")
    assert file_sha256(one, two) == hashlib.sha256(b"a" * 300_000 + b"b").hexdigest()
    assert file_sha256(two) == hashlib.sha256(b"b").hexdigest()
    with pytest.raises(InputError, match="none cannot be read"):
        file_sha256(one, tmp_path / "none")


def test_json_is_strict_nan_is_null_and_infinity_is_refused(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [float("nan"), {"b": np.float64("nan")}], "c": (1.5, "NaN", None, True)})
    assert json.loads(path.read_text()) == {"a": [None, {"b": None}], "c": [1.5, "NaN", None, True]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text())["c"][0] == 1.5  # what was there is whole
