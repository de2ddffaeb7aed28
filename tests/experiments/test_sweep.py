"""The sweep: what is finished is never run again, what changed is made anew, and one failing trial stops no other.

The stages are replaced by one that writes what they write, except for baselines: configs and networks are tested
elsewhere. Several atlases: `test_sweep_atlases.py`. Not covered: Dask workers on other machines, and network stages
that they run.
"""

import json
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from small_stores import planted_store
from sweeps import LIMBIC, Stages, small
from tqdm import tqdm

from bundle.anatomy.atlas import load_atlas
from bundle.data.splits import load_splits
from bundle.errors import InputError
from bundle.experiments import trial as module
from bundle.experiments.report import write_report
from bundle.experiments.statistics import read_outcomes
from bundle.experiments.sweep import Sweep, describe_data, plan_trials, read_sweep, run_sweep
from bundle.experiments.trial import is_finished
from bundle.files import ROOT
from bundle.locks import locked
from bundle.preparation.store import read_manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("data"), subjects=36, effect=2.0, frames=60, per_label=1, every=20)


@pytest.fixture
def calls(monkeypatch, store):
    """Stages that were run."""
    stages = Stages(store)
    monkeypatch.setattr(module, "run_config", stages)
    return stages


def test_stages_run_in_order_once_and_share_the_store(store, tmp_path, calls):
    assert run_sweep(small(store, tmp_path)) == []
    of_trial = [call[:2] for call in calls.calls if call[2] == "limbic__seed-0__fold-1"]
    assert of_trial == [("pretrain", ("pretrain",)), ("run", ("train",)), ("run", ("train", "evaluate"))]
    of_control = [call[:2] for call in calls.calls if call[2] == "random_weights__seed-0__fold-0"]
    assert of_control == [("run", ("train",)), ("run", ("train", "evaluate"))]
    before = len(calls.calls)
    assert run_sweep(small(store, tmp_path)) == []
    assert len(calls.calls) == before
    assert not list((tmp_path / "results").rglob("last.pt"))


def test_a_readout_is_an_overlay_of_all_that_follows_pretraining(store, tmp_path, calls):
    strategies = [{"name": "covariance", "mask": "random_tube", "readout": "covariance"}]
    sweep = small(store, tmp_path, baselines=[], splits={"folds": 3, "test": [1]}, strategies=strategies)
    run_sweep(replace(sweep, steps=["attribute"], configs=["demo"]))
    own = "readouts/covariance"
    assert [call[1] for call in calls.calls] == [
        ("pretrain", "masks/random_tube", "demo"),
        ("train", own, "demo"),
        ("train", own, "evaluate", "demo"),
        ("train", own, "attribute", "demo"),
    ]
    assert (tmp_path / "results" / "configs" / "readouts_covariance.json").is_file()


def test_strategies_that_differ_after_pretraining_share_it(store, tmp_path, calls):
    own = {"mask": "region", "pretrain": LIMBIC}
    strategies = [
        own | {"name": "mean"},
        own | {"name": "covariance", "readout": "covariance"},
        own | {"name": "longer", "train": {"max_epochs": 3}},
        {"name": "frontal", "mask": "region", "pretrain": {"regions": ["frontal"]}},
    ]
    sweep = small(store, tmp_path, strategies=strategies, steps=["reconstruct"], baselines=[])
    assert run_sweep(sweep, workers=4) == []
    assert sum(call[0] == "pretrain" for call in calls.calls) == 4  # of two folds, limbic and frontal
    assert sum("reconstruct" in call[1] for call in calls.calls) == 4
    folders = {(c.strategy.name, c.fold): Path(c.folder, "pretrain").resolve() for c in plan_trials(sweep)}
    for fold in "01":
        assert folders["mean", fold] == folders["covariance", fold] == folders["longer", fold]
        assert (folders["mean", fold] / "best.pt").is_file()
    assert len(set(folders.values())) == 4
    run_sweep(replace(sweep, seeds=[1], splits={"folds": 3, "test": [0]}))
    assert sum(call[0] == "pretrain" for call in calls.calls) == 6


def test_a_shared_pretraining_that_failed_is_made_by_the_next_to_come(store, tmp_path, calls):
    own = {"mask": "region", "pretrain": LIMBIC}
    strategies = [own | {"name": "mean"}, own | {"name": "covariance", "readout": "covariance"}]
    sweep = small(store, tmp_path, strategies=strategies, baselines=[], splits={"folds": 3, "test": [0]})
    calls.broken.add("mean__seed-0__fold-0")
    assert run_sweep(sweep) == ["mean__seed-0__fold-0: broken on purpose"]
    calls.broken.clear()
    assert run_sweep(sweep) == []
    assert [call[2].split("__")[0] for call in calls.calls if call[0] == "pretrain"] == ["mean", "covariance"]


def test_the_best_encoder_is_frozen_and_the_best_classifier_tested_on_one_split_file(store, tmp_path, calls):
    run_sweep(small(store, tmp_path, baselines=[], splits={"folds": 3, "test": [1]}, strategies=[LIMBIC]))
    (pretrain, train, test) = calls.overrides
    (splits,) = (tmp_path / "results" / "splits").iterdir()
    assert {stage["splits_file"] for stage in calls.overrides} == {str(splits)}
    assert train["encoder_checkpoint"] == pretrain["output_dir"] / "best.pt"
    assert train == test  # evaluate.json tests best.pt of this folder
    assert "checkpoint" not in test


def test_another_plan_for_the_same_folder_leaves_the_splits_of_waiting_cells_alone(store, tmp_path):
    """As when a sweep's file is edited and started again while trials of the first are still to come."""
    first = plan_trials(small(store, tmp_path))
    before = {trial.splits_file: load_splits(trial.splits_file) for trial in first}
    second = plan_trials(small(store, tmp_path, splits={"folds": 3, "seed": 7, "test": [0, 1]}))
    assert {trial.splits_file: load_splits(trial.splits_file) for trial in first} == before
    assert not set(before) & {trial.splits_file for trial in second}


def test_overrides_reach_their_stage_and_a_strategy_has_the_last_word(store, tmp_path, calls):
    own = {"name": "own", "mask": "region", "train": {"max_epochs": 4}}
    changes = {"overrides": {"frames": 4, "max_epochs": 1}, "pretrain": {"max_epochs": 2}, "train": {"max_epochs": 3}}
    run_sweep(
        small(store, tmp_path, baselines=[], splits={"folds": 3, "test": [1]}, strategies=[LIMBIC, own], **changes)
    )
    assert [stage["max_epochs"] for stage in calls.overrides] == [2, 3, 3, 2, 4, 4]
    assert {stage["frames"] for stage in calls.overrides} == {4}


def test_a_failing_cell_is_named_stops_no_other_and_goes_on_where_it_was(store, tmp_path, calls):
    calls.broken.add("limbic__seed-0__fold-0")
    failures = run_sweep(small(store, tmp_path))
    assert failures == ["limbic__seed-0__fold-0: broken on purpose"]
    assert sum(is_finished(trial) for trial in plan_trials(small(store, tmp_path))) == 7
    calls.broken.clear()
    calls.calls.clear()
    assert run_sweep(small(store, tmp_path)) == []
    assert {call[2] for call in calls.calls} == {"limbic__seed-0__fold-0"}


def written(sweep: Sweep) -> dict[Path, int]:
    """When each file of the trials was written, in ns."""
    return {path: path.stat().st_mtime_ns for path in (Path(sweep.results) / "trials").rglob("*") if path.is_file()}


def test_dask_gives_what_this_machine_gives_to_the_byte_and_goes_on_where_it_was(store, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed; pip install distributed")
    local, remote = (
        small(store, tmp_path / name, strategies=[], baselines=["majority", "site_age_sex"])
        for name in ("local", "dask")
    )
    assert run_sweep(local) == []
    in_the_way = Path(remote.results) / "trials" / "majority__seed-0__fold-1"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()  # a file where the trial's folder should be
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None
    ) as cluster:
        (failure,) = run_sweep(remote, scheduler=cluster.scheduler_address)
        assert failure.startswith("majority__seed-0__fold-1: ")
        assert "cannot be written" in failure
        assert sum(is_finished(trial) for trial in plan_trials(remote)) == 3
        in_the_way.unlink()
        before = written(remote)
        assert run_sweep(remote, scheduler=cluster.scheduler_address) == []
        after = written(remote)
        assert before.items() < after.items()
        assert run_sweep(remote, scheduler=cluster.scheduler_address) == []
        assert written(remote) == after
    for here, there in zip(plan_trials(local), plan_trials(remote), strict=True):
        for name in ("scores.json", "subjects.tsv"):
            assert (Path(here.folder) / name).read_bytes() == (Path(there.folder) / name).read_bytes()


def test_a_scheduler_that_does_not_answer_is_said_plainly(store, tmp_path):
    pytest.importorskip("distributed", reason="Dask is not installed; pip install distributed")
    with pytest.raises(InputError, match=r"no Dask scheduler answers at nonsense://1"):
        run_sweep(small(store, tmp_path), scheduler="nonsense://1")


def test_cells_name_configs_that_any_working_directory_finds(store, tmp_path, calls, monkeypatch):
    """A Dask worker has one of its own."""
    for name in ("mine.json", "overlay.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    sweep = small(store, tmp_path, strategies=[{"name": "mine", "mask": "mine.json"}], configs=["demo", "overlay.json"])
    assert run_sweep(sweep) == []
    assert calls.calls[0][1] == ("pretrain", str(tmp_path / "mine.json"), "demo", str(tmp_path / "overlay.json"))


def test_a_worker_elsewhere_takes_relative_paths_from_where_the_sweep_was_started(store, tmp_path, calls, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copyfile(load_atlas().source, tmp_path / "here" / "atlas.nii")
    sweep = small(store, tmp_path, baselines=[], overrides={"atlas": "atlas.nii"})
    trials = plan_trials(sweep)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for trial in trials:
        module.run_trial(trial)
    assert calls.directories == {str(tmp_path / "here")}


def test_the_report_finds_the_atlas_that_the_sweep_named(store, tmp_path, calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(load_atlas().source, "atlas.nii")
    run_sweep(small(store, tmp_path, strategies=[], overrides={"atlas": "atlas.nii"}))
    monkeypatch.chdir("/")
    assert write_report(tmp_path / "results", resamples=20).is_file()


@pytest.fixture
def heeds_interrupts():
    """A shell that starts a job in the background has it ignore SIGINT; here it is heeded."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupted_sweep_begins_no_other_trial(store, tmp_path, calls, monkeypatch):
    started, noticed = threading.Event(), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            noticed.set()
            super().shutdown(wait=wait)

    def wait_for(futures):
        if futures:  # the baselines, of which there are none, are waited for first
            started.set()
        return as_completed(futures)

    def interrupted(*stage):
        if not calls.calls:
            assert started.wait(60)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert noticed.wait(60)
        calls(*stage)

    monkeypatch.setattr("bundle.experiments.sweep.ThreadPoolExecutor", Pool)
    monkeypatch.setattr("bundle.experiments.sweep.as_completed", wait_for)

    monkeypatch.setattr(module, "run_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(small(store, tmp_path, baselines=[]))
    assert len({call[2] for call in calls.calls}) == 1


def test_progress_is_shown_for_the_cells_that_are_left(store, tmp_path, calls, capsys):
    """So that trials finished long ago make the estimate of the time left no shorter."""
    run_sweep(small(store, tmp_path))
    shown = capsys.readouterr().err
    assert "baselines: 100%" in shown
    assert "| 6/6 [" in shown
    (tmp_path / "results" / "trials" / "limbic__seed-0__fold-1" / "trial.json").unlink()
    run_sweep(small(store, tmp_path))
    shown = capsys.readouterr().err
    assert "baselines" not in shown
    assert "networks:   0%|          | 0/1 [00:00<?" in shown
    assert "| 1/1 [" in shown


def test_time_left_is_right_when_cells_end_in_waves(store, tmp_path, calls, monkeypatch, capsys):
    """As four at a time would: each wave takes an hour, and its trials end half a minute apart."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    seen = threading.Semaphore(0)

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            seen.release()

    monkeypatch.setattr("bundle.experiments.sweep.tqdm", Bar)

    def stage(*job):
        if calls.calls and len(calls.calls) % 2 == 0:  # a trial begins
            assert seen.acquire(timeout=60)  # until the bar has seen the trial before
        calls(*job)
        done = len(calls.calls) // 2  # trials, of two stages each
        clock[0] = 3600.0 * ((done + 3) // 4) + 30 * ((done + 3) % 4) if done else 0.0

    monkeypatch.setattr(module, "run_config", stage)
    run_sweep(small(store, tmp_path, baselines=[], strategies=["random_weights"], seeds=list(range(6))))
    shown = capsys.readouterr().err
    for done, hours in ((4, 2), (8, 1)):
        left = re.search(rf"{done}/12 \[[\d:]+<([\d:]+)", shown).group(1)
        left = pd.Timedelta(left if left.count(":") == 2 else f"0:{left}")
        assert left / pd.Timedelta(hours=hours) == pytest.approx(1, abs=0.1)


def test_an_interrupted_cell_repeats_no_finished_stage(store, tmp_path, calls):
    trial = next(c for c in plan_trials(small(store, tmp_path)) if "limbic" in c.folder)
    module.run_trial(trial)
    path = Path(trial.folder) / "trial.json"
    record = json.loads(path.read_text())
    del record["seconds"]["test"]
    path.write_text(json.dumps(record | {"finished": False}))
    calls.calls.clear()
    module.run_trial(trial)
    assert [call[1] for call in calls.calls] == [("train", "evaluate")]


def test_a_cell_at_work_is_refused_and_one_finished_meanwhile_not_repeated(store, tmp_path, monkeypatch, calls):
    monkeypatch.setattr(module, "locked", partial(locked, patience_s=0))
    trial = next(c for c in plan_trials(small(store, tmp_path)) if "limbic" in c.folder)
    refusals = []

    def second(*stage):
        try:
            module.run_trial(trial)
        except InputError as error:
            refusals.append(str(error))
        calls(*stage)

    monkeypatch.setattr(module, "run_config", second)
    module.run_trial(trial)
    assert len(refusals) == len(calls.calls) == 3  # in each stage
    assert all(f"{trial.folder}.lock is locked" in refusal for refusal in refusals)
    module.run_trial(trial)
    assert len(calls.calls) == 3


def test_changed_settings_make_only_the_affected_cells_anew(store, tmp_path, calls):
    run_sweep(small(store, tmp_path))
    calls.calls.clear()
    run_sweep(small(store, tmp_path, seeds=[0, 1]))  # more seeds: nothing of seed 0 again
    assert {call[2].split("__")[1] for call in calls.calls} == {"seed-1"}
    calls.calls.clear()
    run_sweep(small(store, tmp_path, overrides={"max_epochs": 3}))
    assert len(calls.calls) == 2 * (3 + 3 + 2)


def test_every_subject_is_tested_once_over_all_folds_or_sites(store, tmp_path, calls):
    everyone = sorted(run["participant_id"] for run in read_manifest(store)["runs"])
    for test in ("all", "sites"):
        folder = tmp_path / test
        run_sweep(small(store, folder, splits={"folds": 3, "test": test}))
        for own in read_outcomes(folder / "results").values():
            assert own.participants == everyone
    assert set(own.folds) == {"north", "south", "west"}


def test_report_comes_from_the_results_folder_alone_and_says_synthetic(store, tmp_path, calls):
    (store.parent / "derivatives").mkdir(exist_ok=True)
    (store.parent / "derivatives" / "truth.json").write_text("{}")
    run_sweep(small(store, tmp_path))
    moved = (tmp_path / "results").rename(tmp_path / "elsewhere")
    html = write_report(moved, resamples=50).read_text()
    markdown = (moved / "report.md").read_text()
    for text in (html, markdown):
        assert "SYNTHETIC data" in text
        for name in ("random_tube", "limbic", "random_weights", "majority"):
            assert name in text
        trial = json.loads((moved / "trials" / "limbic__seed-0__fold-0" / "trial.json").read_text())
        assert trial["sha256"] in text
        assert trial["versions"]["monai"] in text
    assert 'src="data:image/png;base64' in html
    assert "://" not in html.replace("http://www.w3.org", "")  # nothing is fetched: one file is the report
    table = pd.read_csv(moved / "table.csv").set_index("strategy")
    assert f"{table.loc['limbic', 'auroc']:.3f}" in html


def test_data_of_unknown_origin_is_not_called_real(store):
    gone = planted_store(store.parent / "gone", subjects=12, effect=0.0, frames=60, per_label=1, every=60)
    (store.parent / "derivatives" / "truth.json").unlink(missing_ok=True)
    assert describe_data(small(gone, store.parent))["synthetic"] is None


def test_strategies_that_would_share_a_folder_are_refused(store, tmp_path):
    names = [{"name": name, "mask": "region"} for name in ("limbic 50%", "limbic_50_")]
    with pytest.raises(InputError, match="'limbic 50%' and 'limbic_50_' would both be filed under 'limbic_50_'"):
        plan_trials(small(store, tmp_path, strategies=names))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "name", ["paper", "leave_one_site_out", "demo", "paper_small", "attribution_small", "truth", "atlases"]
)
def test_ready_made_sweeps_are_valid(name):
    assert read_sweep(ROOT / "configs" / "sweeps" / f"{name}.json").strategies


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"strategies": ["limbo"]}, "no such config"),
        ({"baselines": ["luck"]}, "unknown"),
        ({"steps": ["dance"]}, "unknown"),
        ({"strategies": [LIMBIC, LIMBIC]}, "same name"),
        ({"strategies": [LIMBIC], "pretrain": {"atlas": "AAL116"}}, "belongs to a strategy or to `overrides`"),
        ({"baselines": [{"baseline": "majority", "atlas": "AAL3"}]}, "one of connectivity_logistic, connectivity_svm"),
        ({"baselines": [{"baseline": "connectivity_svm", "atlas": ["AAL3", "AAL3"]}]}, "same name"),
        ({"baselines": [{"baseline": "site", "harmonise": "combat"}]}, "`harmonise` .'combat'. or both"),
        ({"baselines": [{"baseline": "connectivity_svm", "harmonise": "other"}]}, "`harmonise` .'combat'. or both"),
        ({"strategies": [{"name": "a", "mask": "region", "harmonise": "combat"}]}, "served without knowing sites"),
        ({"flavour": 1}, "not a sweep"),
        ({}, "nothing to run"),
    ],
)
def test_mistakes_are_named(tmp_path, content, message):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"store": "s", "results": "r", "splits": {}} | content))
    with pytest.raises(InputError, match=message):
        read_sweep(path)
