"""Preparing a dataset: what is written, what is skipped or redone, what fails and stays alone in failing.

Pitfalls 1, 2, 6. Not covered here: single files (test_bold.py), transforms (test_transforms.py), many processes
(test_prepare_processes.py).
"""

import json
from dataclasses import replace
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import numpy as np
import pandas as pd
import pytest
from monai.transforms import MapTransform
from nilearn.image import load_img, resample_img
from small_runs import (
    coarse_brain,
    coarse_signal,
    run_of,
    save_bold,
    save_mask,
    save_three_and_a_truncated_one,
    status_of,
)

from bundle import files as bundle_files
from bundle.anatomy import grid
from bundle.errors import InputError
from bundle.files import WriteError, file_sha256
from bundle.preparation import prepare as module
from bundle.preparation import store
from bundle.preparation.chain import load_preparation, rebuild_preparation
from bundle.preparation.prepare import prepare
from bundle.preparation.sources import find_runs


def reason_of(summary, run_id):
    return next(row["reason"] for row in summary["rows"] if row["run_id"] == run_id)


@pytest.fixture
def files(tmp_path):
    return save_three_and_a_truncated_one(tmp_path)


def test_good_runs_are_stored_and_a_bad_one_is_named(files):
    runs = [run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "cut", "b")]
    summary = prepare(runs, files / "store")
    assert status_of(summary) == {"sub-a": "prepared", "sub-cut": "failed", "sub-b": "prepared"}
    assert (summary["prepared"], summary["failed"], summary["current"], summary["updated"]) == (2, 1, 0, 0)
    assert "cut.nii.gz is truncated or damaged" in reason_of(summary, "sub-cut")
    manifest = store.read_manifest(files / "store")
    assert [run["run_id"] for run in manifest["runs"]] == ["sub-a", "sub-b"]
    assert manifest["parameters_hash"] == load_preparation().parameters_hash
    table = pd.read_csv(files / "store/summary.tsv", sep="\t")
    assert table["status"].tolist() == ["prepared", "failed", "prepared"]
    assert table["frames"].dropna().tolist() == [29, 29]


def test_a_record_says_all_that_is_needed_to_undo_and_to_trust(files):
    run = run_of(files / "a.nii.gz", "sub-a", mask=save_mask(files / "mask.nii.gz", coarse_brain()), diagnosis=1)
    prepare([run], files / "store")
    record = store.read_run(files / "store", "sub-a")
    values = store.read_values(files / "store", "sub-a", 0, record["frames"]).astype(float)
    z = (values - record["mean"]) / record["sd"]
    expected = {
        "run_id": "sub-a", "participant_id": "sub-a", "site": "A", "diagnosis": 1, "participant": {"age": 10.5},
        "source": str(files / "a.nii.gz"), "mask_source": str(files / "mask.nii.gz"), "tr_in": 1.0, "tr": 0.8,
        "frames_in": 24, "frames": 29, "shape_in": [25, 30, 25], "axcodes_in": "RAS", "space": "MNI152",
        "fill": pytest.approx(z.min(), abs=1e-3),
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    assert z.mean() == pytest.approx(0, abs=1e-3)
    assert z.std() == pytest.approx(1, abs=1e-3)
    assert 900 < record["mean"] < 1000  # 1000 in the brain, less what its edge takes from the 0 around it
    assert record["mni_overlap"] > 0.8
    assert set(record["coverage"]) == {
        "frontal", "parietal", "temporal", "occipital", "cerebellum", "limbic", "subcortical",
    }  # fmt: skip
    assert all(0.8 < share <= 1 for share in record["coverage"].values())
    assert {"numpy", "nibabel", "monai"} <= record["versions"].keys()


def test_running_again_skips_what_is_current(files):
    runs = [run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "b")]
    prepare(runs, files / "store")
    before = {path: path.stat().st_mtime_ns for path in (files / "store/runs").rglob("*.*")}
    assert status_of(prepare(runs, files / "store")) == {"sub-a": "current", "sub-b": "current"}
    assert {path: path.stat().st_mtime_ns for path in (files / "store/runs").rglob("*.*")} == before


def hashed(monkeypatch):
    """Names of the files that are hashed from now on."""
    names = []
    monkeypatch.setattr(
        module, "file_sha256", lambda *paths: names.extend(Path(p).name for p in paths) or file_sha256(*paths)
    )
    return names


def test_files_that_did_not_change_are_not_read_again(files, monkeypatch):
    monkeypatch.setattr(bundle_files, "SETTLED_S", -1.0)
    runs = [run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "b")]
    first = prepare(runs, files / "store")
    names = hashed(monkeypatch)
    again = prepare([*runs, run_of(files / "c.nii.gz", "sub-c")], files / "store")
    assert names == ["c.nii.gz"]
    assert status_of(again) == {"sub-a": "current", "sub-b": "current", "sub-c": "prepared"}
    assert [row | {"status": "prepared"} for row in again["rows"][:2]] == first["rows"]
    names.clear()
    assert prepare(runs, files / "store", rehash=True)["current"] == 2
    assert sorted(names) == ["a.nii.gz", "b.nii.gz"]
    (files / "a.nii.gz").touch()
    names.clear()
    assert prepare(runs, files / "store")["current"] == 2
    assert names == ["a.nii.gz"]
    (files / "store" / ".seen-sources.json").write_text("{")
    names.clear()
    assert prepare(runs, files / "store")["current"] == 2
    assert sorted(names) == ["a.nii.gz", "b.nii.gz"]


def test_what_is_remembered_does_not_hide_duplicates_or_other_parameters(files, monkeypatch):
    monkeypatch.setattr(bundle_files, "SETTLED_S", -1.0)
    run = run_of(files / "a.nii.gz", "sub-a")
    prepare([run], files / "store")
    copy = files / "copy.nii.gz"
    copy.write_bytes((files / "a.nii.gz").read_bytes())
    assert prepare([run, run_of(copy, "sub-copy")], files / "store")["failed"] == 2
    assert status_of(prepare([run], files / "store", load_preparation(new_tr=1.0))) == {"sub-a": "prepared"}


def test_files_that_were_just_written_are_read_again(files, monkeypatch):
    """They could change within a tick of the disk's clock."""
    monkeypatch.setattr(bundle_files, "SETTLED_S", 3600.0)
    run = run_of(files / "a.nii.gz", "sub-a")
    prepare([run], files / "store")
    names = hashed(monkeypatch)
    assert prepare([run], files / "store")["current"] == 1
    assert names == ["a.nii.gz"]


CHANGES = {
    "source": lambda run, folder: save_bold(run["bold"], coarse_signal(24, 9), tr=1.0) and {},
    "mask": lambda run, folder: {"mask": save_mask(folder / "mask.nii", coarse_brain())},
    "TR": lambda run, folder: {"tr": 2.0},
    "sidecar's TR": lambda run, folder: (folder / "a.json").write_text('{"RepetitionTime": 2.0}') and {},
    "space": lambda run, folder: {"space": "MNI152NLin6Asym"},
    "tampered frames": lambda run, folder: (folder / "store/runs/sub-a/frames.npy").write_bytes(b"x") and {},
    "tampered record": lambda run, folder: (folder / "store/runs/sub-a/run.json").write_text("{") and {},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("settled_s", [-1.0, 3600.0], ids=["by stamps", "by hashes"])
def test_what_changed_is_done_again(files, change, settled_s, monkeypatch):
    monkeypatch.setattr(bundle_files, "SETTLED_S", settled_s)
    run = run_of(files / "a.nii.gz", "sub-a")
    prepare([run], files / "store")
    changed = run | change(run, files)
    assert status_of(prepare([changed], files / "store")) == {"sub-a": "prepared"}
    assert status_of(prepare([changed], files / "store")) == {"sub-a": "current"}
    assert store.is_intact(files / "store", store.read_run(files / "store", "sub-a"))


def test_other_parameters_redo_everything(files):
    run = run_of(files / "a.nii.gz", "sub-a")
    prepare([run], files / "store")
    assert status_of(prepare([run], files / "store", load_preparation(new_tr=1.0))) == {"sub-a": "prepared"}
    assert store.read_run(files / "store", "sub-a")["frames"] == 24


@pytest.mark.parametrize("column", ["participant_id", "site", "diagnosis", "participant"])
def test_changed_participant_columns_rewrite_only_the_record(files, column):
    run = run_of(files / "a.nii.gz", "sub-a")
    prepare([run], files / "store")
    frames = files / "store/runs/sub-a/frames.npy"
    before = frames.stat()
    new = {"participant_id": "sub-z", "site": "Z", "diagnosis": None, "participant": {"age": 11}}[column]
    assert status_of(prepare([run | {column: new}], files / "store")) == {"sub-a": "updated"}
    assert (frames.stat().st_ino, frames.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert store.read_run(files / "store", "sub-a")[column] == new
    assert store.read_manifest(files / "store")["runs"][0][column] == new


def test_the_same_content_twice_is_refused_whichever_came_first(files):
    copy = files / "copy.nii.gz"
    copy.write_bytes((files / "a.nii.gz").read_bytes())
    a, b = run_of(files / "a.nii.gz", "sub-a"), run_of(files / "b.nii.gz", "sub-b")
    summary = prepare([a, b, run_of(copy, "sub-copy")], files / "store")
    assert status_of(summary) == {"sub-a": "failed", "sub-b": "prepared", "sub-copy": "failed"}
    assert "same content as sub-a" in reason_of(summary, "sub-copy")
    prepare([a], files / "store")
    summary = prepare([run_of(copy, "sub-copy")], files / "store")  # the other is in the store only
    assert "same content as sub-a in the store" in reason_of(summary, "sub-copy")


def test_the_same_run_id_twice_is_refused(files):
    summary = prepare([run_of(files / f"{name}.nii.gz", "sub-a") for name in ("a", "b")], files / "store")
    assert summary["failed"] == 2
    assert "2 runs have the run id sub-a" in reason_of(summary, "sub-a")
    assert store.read_manifest(files / "store")["runs"] == []


def test_run_ids_that_some_disks_cannot_tell_apart_are_refused(files):
    runs = [run_of(files / "a.nii.gz", "sub-A"), run_of(files / "b.nii.gz", "sub-a"), run_of(files / "c.nii.gz")]
    assert list(status_of(prepare(runs, files / "store")).values()) == ["failed", "failed", "prepared"]


def test_a_subject_of_another_dataset_with_the_same_run_id_does_not_replace_the_stored_one(files):
    prepare([run_of(files / "a.nii.gz", "sub-01", site="north")], files / "store")
    other = run_of(files / "b.nii.gz", "sub-01", site="south")
    summary = prepare([other], files / "store")
    assert "the store holds another sub-01, from " in reason_of(summary, "sub-01")
    assert store.read_run(files / "store", "sub-01")["site"] == "north"
    moved = (files / "a.nii.gz").rename(files / "moved.nii.gz")  # the same content elsewhere is the same run
    assert prepare([run_of(moved, "sub-01", site="north")], files / "store")["current"] == 1


def test_runs_that_have_left_the_source_are_named(files, caplog):
    a, b = (run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "b"))
    prepare([a, b], files / "store")
    assert "not in this source" not in caplog.text
    prepare([a], files / "store")
    assert "holds 1 runs that are not in this source and stay in use, such as sub-b" in caplog.text


def test_a_mask_that_takes_the_background_for_brain_is_said(files):
    everything = save_mask(files / "mask.nii.gz", np.ones(coarse_brain().shape, bool))
    summary = prepare([run_of(files / "a.nii.gz", "sub-a", mask=everything)], files / "store")
    assert "its brain mask has 3.8 times the volume of the MNI brain" in summary["rows"][0]["warnings"]
    assert prepare([run_of(files / "a.nii.gz", "sub-a")], files / "store")["rows"][0]["warnings"] == ""


def test_failures_before_reading_are_listed_too(files):
    runs = [
        run_of(files / "absent.nii.gz", "sub-1"),
        run_of(files / "a.nii.gz", "sub/2"),
        run_of(files / "a.nii.gz", "sub-3", problem="sub-3 has no row in participants.tsv"),
        run_of(files / "a.nii.gz", "sub-4", mask=files / "absent_mask.nii"),
        run_of(files / "b.nii.gz", "sub-5"),
    ]
    summary = prepare(runs, files / "store")
    assert (summary["failed"], summary["prepared"]) == (4, 1)
    for run_id, words in (
        ("sub-1", "does not exist"),
        ("sub/2", "run id"),
        ("sub-3", "no row"),
        ("sub-4", "absent_mask"),
    ):
        assert words in reason_of(summary, run_id)


def test_a_run_that_fails_later_keeps_its_earlier_version_and_says_so(files):
    run = run_of(files / "a.nii.gz", "sub-a")
    prepare([run], files / "store")
    run["bold"].write_bytes(b"broken")
    summary = prepare([run], files / "store")
    assert reason_of(summary, "sub-a").endswith("the store still holds the version prepared earlier")
    assert store.is_intact(files / "store", store.read_run(files / "store", "sub-a"))


def test_an_unexpected_error_is_listed_with_its_type_and_logged(files, monkeypatch, caplog):
    def out_of_memory(*args):
        raise MemoryError("no 3 TiB")

    monkeypatch.setattr(module.atlas, "region_coverage", out_of_memory)
    summary = prepare([run_of(files / "a.nii.gz", "sub-a")], files / "store")
    assert "failed unexpectedly: MemoryError: no 3 TiB" in reason_of(summary, "sub-a")
    assert "Traceback" in caplog.text


def test_an_error_before_reading_stops_its_own_run_only(files, monkeypatch):
    def forbidden(path, *args):
        if path.name == "a.nii.gz":
            raise PermissionError("a.nii.gz")
        return opened(path, *args)

    opened = module.open_bold
    monkeypatch.setattr(module, "open_bold", forbidden)
    summary = prepare([run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "b")], files / "store")
    assert status_of(summary) == {"sub-a": "failed", "sub-b": "prepared"}
    assert "failed unexpectedly: PermissionError" in reason_of(summary, "sub-a")


def test_a_full_disk_stops_the_job_and_leaves_nothing_half_written(files):
    runs = [run_of(files / f"{name}.nii.gz", f"sub-{name}") for name in ("a", "b")]
    limits = getrlimit(RLIMIT_FSIZE)  # stands in for a full disk: the kernel refuses the write
    setrlimit(RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="free space or choose another folder"):
            prepare(runs, files / "store")
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
    assert list((files / "store/runs").iterdir()) == []
    assert prepare(runs, files / "store")["prepared"] == 2


def test_parameters_decide_the_hash():
    changes = ({}, {"new_tr": 0.8}, {"new_tr": 1.0}, {"min_frames": 30}, {"min_overlap": 0.5}, {"high_pass": 0.01})
    assert len({load_preparation(**change).parameters_hash for change in changes}) == 5
    same = ({}, {"min_coverage": 0.1}, {"on_low_coverage": "exclude"}, {"workers": 2}, {"output_dir": "elsewhere"})
    assert len({load_preparation(**change).parameters_hash for change in same}) == 1


def test_a_preparation_is_made_again_from_what_a_store_says_of_it():
    made = load_preparation(new_tr=1.0, confounds=["motion"], low_pass=0.1)
    recorded = json.loads(json.dumps(made.parameters()))
    assert rebuild_preparation(recorded, "model.json").parameters_hash == made.parameters_hash
    with pytest.raises(InputError, match="with a step Smoothd that is not of this bundle"):
        rebuild_preparation(recorded | {"steps": [{"step": "Smoothd"}]}, "model.json")
    with pytest.raises(InputError, match="with another dtype"):
        rebuild_preparation(recorded | {"dtype": "int8"}, "model.json")


def test_a_step_that_hides_its_arguments_is_refused():
    class Hidingd(MapTransform):
        def __init__(self, width, keys="bold"):
            super().__init__(keys)

        def __call__(self, data):
            return data

    with pytest.raises(InputError, match="Hidingd does not keep its argument 'width'"):
        replace(load_preparation(), steps=[Hidingd(3)]).parameters()


@pytest.mark.parametrize("bad", [{"new_tr": 0}, {"new_tr": 800}, {"min_frames": 0}, {"min_overlap": 1.5}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad)).replace("new_tr", "TR")):
        load_preparation(**bad)


def test_nothing_to_prepare_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no runs"):
        prepare([], tmp_path / "store")


def test_band_passed_athena_runs_keep_their_negative_half_and_every_session(tmp_path):
    (tmp_path / "phenotypes.csv").write_text("ScanDir ID,Site,DX\n10042,5,3\n")
    for session in (1, 2):
        data = coarse_signal(24, session, mean=0.0, sd=1.0)  # around 0, as sfnwmrda files are
        path = tmp_path / f"0010042/sfnwmrda0010042_session_{session}_rest_1.nii.gz"
        save_bold(path, data, tr=2.0, sform=1)  # Athena's names say MNI, the headers need not
    assert prepare(find_runs(tmp_path), tmp_path / "store")["prepared"] == 2
    records = store.read_manifest(tmp_path / "store")["runs"]
    assert [record["run_id"] for record in records] == [f"sub-0010042_ses-{n}_task-rest_run-1" for n in (1, 2)]
    for record in records:
        z = store.read_clip(tmp_path / "store", record["run_id"], 0, record["frames"])
        assert abs(record["mean"]) < 0.01
        assert 0.45 < (z < 0).mean() < 0.55
        assert (record["site"], record["diagnosis"]) == ("NYU", "adhd")


# --- real files -------------------------------------------------------------------------------------------------------


def test_the_real_run(shared, tmp_path):
    path = next((shared / "real").glob("*_bold.nii.gz"))
    run = run_of(path, "sub-01_task-facerep")
    summary = prepare([run], tmp_path)
    assert summary["prepared"] == 1, summary["rows"]
    record = store.read_run(tmp_path, run["run_id"])
    assert (record["tr_in"], record["frames_in"], record["frames"], record["space"]) == (2.0, 120, 298, "MNI152")
    assert record["axcodes_in"] == "LAS"
    assert 0.8 < record["mni_overlap"] < 0.95  # the field of view misses the low cerebellum
    assert min(record["coverage"], key=record["coverage"].get) == "cerebellum"
    image = load_img(path)
    expected = resample_img(
        image.slicer[..., 10], grid.AFFINE, grid.SHAPE, interpolation="linear", force_resample=True,
        copy_header=True, fill_value=np.nan,
    ).get_fdata()  # fmt: skip
    voxels = store.read_voxels(tmp_path, run["run_id"])
    values = store.read_values(tmp_path, run["run_id"], 25, 1)[0]  # 10 * 2.0 s = 25 * 0.8 s
    both = np.isfinite(expected.ravel()[voxels])
    assert both.mean() > 0.9
    np.testing.assert_allclose(values[both], expected.ravel()[voxels][both], atol=record["sd"] * 4 / 2048)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("facerep_orig_bigendian_pair.hdr", "must be 4D"),
        ("moae_native_3D_float32.nii.gz", "must be 4D"),
        ("moae_native_TR-zero_3frames.nii.gz", "but 20 are needed"),
        ("nibabel_example4d_TR2000sec_2frames.nii.gz", "low overlap"),
        ("nitime_fmri1_slab_40frames.nii.gz", "low overlap"),
    ],
)
def test_awkward_real_files_are_refused_even_when_tr_and_space_are_given(shared, tmp_path, name, words):
    path = shared / "awkward" / name
    for overrides in ({}, {"tr": 2.0, "space": "MNI"}):
        summary = prepare([run_of(path, "sub-01", **overrides)], tmp_path)
        assert summary["failed"] == 1
        reason = reason_of(summary, "sub-01")
        assert name in reason
        assert "\n" not in reason
    assert words in reason  # with TR and space given


def test_a_link_to_itself_is_one_failed_run(tmp_path):
    loop = tmp_path / "loop.nii"
    loop.symlink_to(loop)
    good = run_of(save_bold(tmp_path / "run.nii", coarse_signal()), "sub-02")
    rows = prepare([run_of(loop), good], tmp_path / "store")["rows"]
    assert [row["status"] for row in rows] == ["failed", "prepared"]
    assert "does not exist" in rows[0]["reason"]
