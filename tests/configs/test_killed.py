"""Trainings that are killed, stopped or starved anywhere go on from there, and end with the same bits as unbroken ones.

The default run kills a few times; the full check, 20 kills with one process and 20 with two under torchrun, is
`python -m pytest -m slow tests/configs/test_killed.py` (half an hour).
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_configs import run, sentence
from trainings import PATIENCE_S, arguments, at, end, overlay, same_checkpoint, start, wait_until

from bundle.training.checkpoints import load_checkpoint

MASK = {"regions": ["limbic", "frontal"], "mask_fraction": 0.5}  # drawn anew for each clip and epoch
SETTINGS = MASK | {"max_epochs": 2, "batch_size": 1, "clip_stride": 30}


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining that nothing disturbed: 2 epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("whole")
    run("pretrain", dataset_dir=str(store), output_dir=str(folder), **SETTINGS)
    return folder


def same(folder: Path, whole: Path) -> None:
    for name in ("last.pt", "best.pt"):
        same_checkpoint(folder / name, whole / name)
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt", "tensorboard"]


def writes(path: Path) -> Callable[[], int]:
    """How often a file has been replaced since."""
    seen: list[int] = []

    def count() -> int:
        now = path.stat().st_mtime_ns if path.is_file() else 0
        if not seen or seen[-1] != now:
            seen.append(now)
        return len(seen) - 1

    count()
    return count


def killed(begin: Callable[[Path], Any], kill: Callable[[Any], None], kills: int, whole: Path, folder: Path) -> None:
    """Kill trainings so often in all, each after some checkpoints and a part of a step; each must end as the whole."""
    chance = random.Random(0)
    done = trainings = 0
    while done < kills:
        output = folder / str(trainings)
        trainings += 1
        while True:
            count, wanted = writes(output / "last.pt"), chance.randint(0, 2)
            process = begin(output)
            if done < kills and wait_until(lambda count=count, wanted=wanted: count() > wanted, process):
                process.join(chance.uniform(0, 0.8))
            else:
                process.join(PATIENCE_S)
            if process.exitcode is not None:
                break
            kill(process)
            done += 1
        assert process.exitcode == 0, output
        same(output, whole)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_with_the_same_bits(whole: Path, store: Path, tmp_path: Path, kills: int):
    def begin(output: Path) -> Any:
        given = arguments("pretrain", ["pretrain"], dataset_dir=store, output_dir=output, **SETTINGS)
        return start(tmp_path / "log.txt", [*given, "--checkpoint_minutes", "0"])

    killed(begin, end, kills, whole, tmp_path)


class Torchrun:
    """`torchrun` with two processes, in the form of a `multiprocessing.Process`."""

    def __init__(self, log: Path, given: list[str], *options: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
        self.process = subprocess.Popen(
            [*command, "-m", "monai.bundle", *given],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        self.pid = self.process.pid

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()

    def join(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            assert seconds < PATIENCE_S

    def workers(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


@pytest.mark.slow
def test_two_processes_killed_anywhere_end_with_the_same_bits(store: Path, tmp_path: Path):
    """All at once, or one of the two, after which torchrun ends the other."""
    chance = random.Random(1)

    def begin(output: Path) -> Torchrun:
        settings = SETTINGS | {"batch_size": 2, "clip_stride": 20}
        given = arguments("pretrain", ["pretrain", "multi_gpu"], dataset_dir=store, output_dir=output, **settings)
        return Torchrun(tmp_path / "log.txt", [*given, "--checkpoint_minutes", "0"])

    def kill(process: Torchrun) -> None:
        workers = process.workers()
        if chance.random() < 0.5 and workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
            process.join(60)
            assert process.exitcode not in (None, 0)
        else:
            end(process)

    unbroken = begin(tmp_path / "unbroken")
    unbroken.join(PATIENCE_S)
    killed(begin, kill, 20, tmp_path / "unbroken", tmp_path)


@pytest.mark.parametrize(
    ("number", "part", "status", "iteration"),
    [(signal.SIGUSR1, "train", 138, 3), (signal.SIGTERM, "validate", 143, 4)],
)
def test_a_signal_ends_it_with_a_checkpoint_of_that_moment(
    number: int, part: str, status: int, iteration: int, whole: Path, store: Path, tmp_path: Path
):
    """At iteration 3 of 4, or while epoch 1 is validated, which is then done when it is resumed."""
    once = overlay(tmp_path, **at(part, "ITERATION_STARTED", 3, "signal_self", number=int(number)))
    entries = SETTINGS | {"dataset_dir": str(store), "output_dir": str(tmp_path / "out")}
    process = start(tmp_path / "log.txt", arguments("pretrain", ["pretrain", once], **entries))
    process.join(PATIENCE_S)
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == status, log[-2000:]
    assert f"{signal.Signals(number).name}: stopped" in log
    assert "Traceback" not in log
    assert load_checkpoint(tmp_path / "out" / "last.pt")["trainer"]["iteration"] == iteration
    run("pretrain", **entries)
    same(tmp_path / "out", whole)


def test_sigterm_to_the_readers_too_lets_the_iteration_end(whole: Path, store: Path, tmp_path: Path):
    """Slurm sends it to every process of a job."""
    entries = SETTINGS | {"dataset_dir": str(store), "output_dir": str(tmp_path / "out"), "num_workers": 2}
    given = arguments("pretrain", ["pretrain"], **entries, checkpoint_minutes=0)
    process = start(tmp_path / "log.txt", given)
    assert wait_until(lambda: (tmp_path / "out" / "last.pt").is_file(), process)
    end(process, signal.SIGTERM)
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 143, log[-2000:]
    assert "killed by signal" not in log
    run("pretrain", **entries)
    same(tmp_path / "out", whole)


def test_a_store_that_vanishes_is_said_in_one_sentence_and_nothing_is_lost(whole: Path, store: Path, tmp_path: Path):
    """A worker reads, whose error reaches the trainer as text only."""
    (tmp_path / "store").symlink_to(store)
    once = overlay(tmp_path, **at("train", "ITERATION_COMPLETED", 2, "unlink", path=str(tmp_path / "store")))
    entries = SETTINGS | {"dataset_dir": str(tmp_path / "store"), "output_dir": str(tmp_path / "out")}
    process = start(tmp_path / "log.txt", arguments("pretrain", ["pretrain", once], **entries, num_workers=1))
    process.join(PATIENCE_S)
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 1
    said = f"error: {tmp_path / 'store'} is not there, or not any more; check the path, and that its disk is mounted"
    assert log.splitlines()[-1] == said
    (tmp_path / "store").symlink_to(store)
    assert load_checkpoint(tmp_path / "out" / "last.pt")["trainer"]["iteration"] >= 2
    run("pretrain", **entries)
    same(tmp_path / "out", whole)


def test_a_full_disk_is_said_in_one_sentence_and_leaves_the_last_checkpoint(whole: Path, store: Path, tmp_path: Path):
    once = overlay(tmp_path, **at("train", "ITERATION_COMPLETED", 3, "limit_files", size=200_000))
    entries = SETTINGS | {"dataset_dir": str(store), "output_dir": str(tmp_path / "out")}
    given = arguments("pretrain", ["pretrain", once], **entries, checkpoint_minutes=0)
    process = start(tmp_path / "log.txt", given)
    process.join(PATIENCE_S)
    log = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 1
    said = (
        f"error: {tmp_path / 'out' / 'last.pt'} cannot be written (File too large); free space or choose another folder"
    )
    assert log.splitlines()[-1] == said
    assert "Traceback" not in log
    assert load_checkpoint(tmp_path / "out" / "last.pt")["trainer"]["iteration"] == 2
    run("pretrain", **entries)
    same(tmp_path / "out", whole)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "Connection "), (signal.SIGSTOP, "Timed out")])
def test_a_lost_process_ends_the_other_with_a_reason(number: int, reason: str, store: Path, tmp_path: Path):
    """Without torchrun, which would end it too: one that is gone is noticed at once, one that hangs after a while."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entries = {"dataset_dir": store, "output_dir": tmp_path / "out", "batch_size": 2, "max_epochs": 1000}
    options = {"checkpoint_minutes": 0, "lost_process_seconds": 20}
    given = arguments("pretrain", ["pretrain", "multi_gpu"], **entries, **options)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first, second = (
        start(tmp_path / f"{rank}.txt", given, **group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)
    )
    try:
        assert wait_until(lambda: (tmp_path / "out" / "last.pt").is_file(), first)
        os.kill(second.pid, number)
        first.join(PATIENCE_S)
        log = (tmp_path / "0.txt").read_text()
        assert first.exitcode == 1, log[-2000:]
        said = log.splitlines()[-1]
        assert said.startswith("error: another training process was lost (")
        assert reason in said
    finally:
        for process in (first, second):
            process.kill()
            process.join(PATIENCE_S)


def test_a_classifier_goes_on_too(store: Path, tmp_path: Path):
    """Its features are made anew, and its head and batch norm are those of the checkpoint."""
    once = overlay(tmp_path, **at("train", "ITERATION_STARTED", 3, "signal_self", number=int(signal.SIGTERM)))
    entries = {"dataset_dir": str(store), "encoder_checkpoint": "random", "max_epochs": 2, "learning_rate": 0.01}
    run("train", **entries, output_dir=str(tmp_path / "whole"))
    with pytest.raises(SystemExit) as caught:
        run("train", once, **entries, output_dir=str(tmp_path / "parts"))
    assert caught.value.code == 143
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["trainer"] == {
        "iteration": 3,
        "epoch_length": 4,
        "max_epochs": 2,
    }
    run("train", **entries, output_dir=str(tmp_path / "parts"))
    same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_hands_on_a_signal_and_starts_again_after_a_loss(store: Path, tmp_path: Path):
    settings = SETTINGS | {"batch_size": 2, "clip_stride": 20, "checkpoint_minutes": 0}

    def begin(name: str, *options: str) -> Torchrun:
        given = arguments(
            "pretrain", ["pretrain", "multi_gpu"], dataset_dir=store, output_dir=tmp_path / name, **settings
        )
        return Torchrun(tmp_path / "log.txt", given, *options)

    unbroken = begin("unbroken")
    unbroken.join(PATIENCE_S)
    stopped = begin("stopped")
    assert wait_until((tmp_path / "stopped" / "last.pt").is_file, stopped)
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join(PATIENCE_S)
    assert stopped.exitcode not in (None, 0)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("SIGTERM: stopped after iteration") == 2
    begin("stopped").join(PATIENCE_S)
    same(tmp_path / "stopped", tmp_path / "unbroken")

    elastic = begin("elastic", "--max_restarts", "1")
    assert wait_until((tmp_path / "elastic" / "last.pt").is_file, elastic)
    os.kill(elastic.workers()[-1], signal.SIGKILL)
    elastic.join(PATIENCE_S)
    assert elastic.exitcode == 0
    assert "Resumed after" in (tmp_path / "log.txt").read_text()[len(log) :]
    same(tmp_path / "elastic", tmp_path / "unbroken")


def test_a_nan_in_the_data_stops_it_names_the_clip_and_keeps_good_weights(store: Path, tmp_path: Path):
    shutil.copytree(store, tmp_path / "store", copy_function=os.link)
    run_id = json.loads((store / "splits.json").read_text())["sets"]["train"][0] + "_task-rest"
    path = tmp_path / "store" / "runs" / run_id / "frames.npy"
    frames = np.load(path)
    path.unlink()
    np.save(path, np.full_like(frames, np.nan))
    with pytest.raises(RuntimeError) as caught:
        run(
            "pretrain",
            dataset_dir=str(tmp_path / "store"),
            output_dir=str(tmp_path / "out"),
            checkpoint_minutes=0,
            **(SETTINGS | {"seed": 1}),
        )
    assert "the loss is nan in epoch 1, iteration" in sentence(caught.value)
    assert f"({run_id} from frame " in sentence(caught.value)
    if (tmp_path / "out" / "last.pt").is_file():
        network = load_checkpoint(tmp_path / "out" / "last.pt")["network"]
        assert all(bool(tensor.isfinite().all()) for tensor in network.values())
