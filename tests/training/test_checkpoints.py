"""Checkpoints: atomic, refused under other settings, read without running code."""

import errno
import os
import pickle
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from bundle.errors import InputError
from bundle.files import host_name
from bundle.networks.swin_mamba import SwinMambaEncoder
from bundle.training.checkpoints import (
    KeepCheckpoints,
    checkpoint_bytes,
    load_checkpoint,
    load_encoder,
    load_network,
    save_checkpoint,
    write_checkpoint,
)
from bundle.training.provenance import Provenance

FACTS = {
    "config": {"seed": 0},
    "preparation": "p",
    "splits": "s",
    "network": {"embed_dim": 4, "in_channels": 1},
    "normalisation": {"mode": "run", "sd_floor": 0.1, "clip": 5.0, "per_frame": False},
}


def pretrained(path: Path, **facts: object) -> nn.Module:
    network = nn.ModuleDict({"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)})
    save_checkpoint({"network": network, "provenance": Provenance(**(FACTS | facts))}, path)
    return network


def trainer_with(folder: Path, scores: list[float], patience: int = 0) -> tuple[Engine, KeepCheckpoints, nn.Linear]:
    """An engine that adds 1 to a weight in each epoch and has given validation scores."""
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    engine = Engine(lambda engine, _: network.weight.data.add_(1) and None)
    keep = KeepCheckpoints(
        folder,
        {"network": network},
        Provenance(**FACTS),
        metric=lambda: scores[engine.state.epoch - 1],
        lower_is_better=True,
        patience=patience,
    )
    keep.attach(engine)
    return engine, keep, network


@pytest.mark.parametrize(
    ("scores", "best"),
    [([3.0, 1.0, 2.0], 2), ([1.0, 2.0, 3.0], 1), ([float("nan"), 2.0, 3.0], 2), ([float("nan")] * 3, 1)],
)
def test_best_is_the_epoch_with_the_best_validation_metric(tmp_path: Path, scores: list[float], best: int):
    engine, _, _ = trainer_with(tmp_path, scores)
    engine.run([0], max_epochs=3)
    assert float(load_checkpoint(tmp_path / "best.pt")["network"]["weight"]) == best
    assert float(load_checkpoint(tmp_path / "last.pt")["network"]["weight"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_resuming_goes_on_with_the_epoch_the_weights_and_the_best_score(tmp_path: Path):
    scores = [1.0, 3.0, 2.0]
    trainer_with(tmp_path, scores)[0].run([0], max_epochs=2)
    engine, keep, network = trainer_with(tmp_path, scores)
    engine.run([0], max_epochs=3)
    assert float(network.weight) == 3
    assert (keep.best, keep.best_epoch) == (-1.0, 1)
    assert float(load_checkpoint(tmp_path / "best.pt")["network"]["weight"]) == 1


def test_a_finished_run_is_not_trained_further(tmp_path: Path):
    trainer_with(tmp_path, [1.0, 2.0])[0].run([0], max_epochs=2)
    engine, _, network = trainer_with(tmp_path, [1.0, 2.0])
    engine.run([0], max_epochs=2)
    assert float(network.weight) == 2


def test_patience_stops_training(tmp_path: Path):
    engine, _, network = trainer_with(tmp_path, [5.0, 4.0, 4.5, 4.2, 1.0], patience=2)
    engine.run([0], max_epochs=5)
    assert float(network.weight) == 4


def test_a_failed_write_leaves_the_old_checkpoint_and_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pretrained(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()

    write = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match=r"last.pt cannot be written \(No space left on device\)"):
        pretrained(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_best_is_written_before_last_so_that_a_kill_between_them_loses_neither(tmp_path: Path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "bundle.training.checkpoints.write_checkpoint", lambda state, path: written.append(Path(path).name)
    )
    trainer_with(tmp_path, [2.0, 1.0])[0].run([0], max_epochs=2)
    assert written == ["best.pt", "last.pt", "best.pt", "last.pt"]


def iterations(folder: Path, per_epoch: int, minutes: float = 0.0, **events: Callable) -> tuple[Engine, nn.Linear]:
    """An engine that adds 1 to a weight in each iteration, with something done at some events, before the handler."""
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    engine = Engine(lambda engine, _: network.weight.data.add_(1) and None)
    for name, action in events.items():
        engine.add_event_handler(Events[name], action)
    keep = KeepCheckpoints(
        folder, {"network": network}, Provenance(**FACTS), lambda: 1.0, lower_is_better=True, minutes=minutes
    )
    keep.attach(engine)
    engine.state.epoch_length = per_epoch
    return engine, network


def weight(folder: Path, name: str = "last.pt") -> float:
    return float(load_checkpoint(folder / name)["network"]["weight"])


def stop(*_: object) -> None:
    raise ValueError("no more")


def test_a_checkpoint_follows_an_iteration_when_it_is_time(tmp_path: Path):
    for minutes, found in ((0.0, 4.0), (60.0, 3.0)):
        folder = tmp_path / str(minutes)
        engine, _ = iterations(folder, 3, minutes, ITERATION_STARTED=lambda e: e.state.iteration == 5 and stop())
        with pytest.raises(ValueError, match="no more"):
            engine.run(range(3), max_epochs=4)
        assert weight(folder) == found  # after iteration 4 of the second epoch, or after the first epoch only


def test_an_error_between_two_iterations_loses_nothing_and_one_within_keeps_the_last_checkpoint(tmp_path: Path):
    for event, found in (("GET_BATCH_STARTED", 4.0), ("ITERATION_STARTED", 3.0)):
        folder = tmp_path / event
        engine, _ = iterations(folder, 3, 60.0, **{event: lambda e: e.state.iteration >= 4 and stop()})
        with pytest.raises(ValueError, match="no more"):
            engine.run(range(3), max_epochs=4)
        assert weight(folder) == found


def test_an_epoch_whose_validation_failed_is_validated_when_it_is_resumed(tmp_path: Path):
    engine, _ = iterations(tmp_path, 3, 60.0, EPOCH_COMPLETED=lambda e: e.state.epoch == 2 and stop())
    with pytest.raises(ValueError, match="no more"):
        engine.run(range(3), max_epochs=2)
    assert weight(tmp_path) == 6
    assert weight(tmp_path, "best.pt") == 3
    validated = []
    engine, network = iterations(tmp_path, 3, EPOCH_COMPLETED=lambda e: validated.append(e.state.epoch))
    engine.run(range(3), max_epochs=2)
    assert validated == [2]
    assert float(network.weight) == 6
    assert load_checkpoint(tmp_path / "last.pt")["best"] == {"metric": -1.0, "epoch": 1, "completed": 2}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_stops_after_the_iteration_with_a_status_of_its_own(tmp_path: Path, number: int, status: int):
    before = signal.getsignal(number)
    engine, network = iterations(
        tmp_path, 3, 60.0, ITERATION_STARTED=lambda e: e.state.iteration == 5 and os.kill(os.getpid(), number)
    )
    with pytest.raises(SystemExit) as caught:
        engine.run(range(3), max_epochs=4)
    assert caught.value.code == status
    assert signal.getsignal(number) is before
    assert weight(tmp_path) == float(network.weight) == 5
    engine, network = iterations(tmp_path, 3)
    engine.run(range(3), max_epochs=4)
    assert float(network.weight) == 12


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path: Path):
    engine, network = iterations(tmp_path, 3)
    engine.add_event_handler(
        Events.ITERATION_STARTED, lambda e: e.state.iteration == 5 and network.weight.data.fill_(torch.nan)
    )
    with pytest.raises(InputError, match=r"weights of network are not finite in iteration 5"):
        engine.run(range(3), max_epochs=2)
    assert weight(tmp_path) == 4


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".unfinished@{host_name()}@{dead.pid}@abc.pt").write_bytes(b"half")
    trainer_with(tmp_path, [1.0])[0].run([0], max_epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_a_checkpoint_is_the_state_of_its_moment(tmp_path: Path):
    """It may be written while the weights change."""
    network = nn.Linear(1, 1)
    content = checkpoint_bytes({"network": network.state_dict()})
    before = network.weight.clone()
    network.weight.data.add_(1)
    (tmp_path / "x.pt").write_bytes(content)
    assert torch.equal(load_checkpoint(tmp_path / "x.pt")["network"]["weight"], before)


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (self.trace.touch, ())


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    evil = Evil(tmp_path / "evil-was-here")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"network": evil}))
    torch.save({"network": evil}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match="cannot be read as a PyTorch checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not evil.trace.exists()


@pytest.mark.parametrize("fact", ["preparation", "splits", "network", "normalisation"])
def test_an_encoder_made_otherwise_is_refused_by_name(tmp_path: Path, fact: str):
    pretrained(tmp_path / "best.pt", **{fact: "other"})
    with pytest.raises(InputError, match=rf"best.pt: was made with {fact}.* 'other'"):
        load_encoder(nn.Linear(3, 2), str(tmp_path / "best.pt"), Provenance(**FACTS))


def test_an_encoder_is_loaded_whole_or_refused(tmp_path: Path):
    network = pretrained(tmp_path / "best.pt")
    encoder = nn.Linear(3, 2)
    load_encoder(encoder, str(tmp_path / "best.pt"), Provenance(**FACTS))
    assert torch.equal(encoder.weight, network["encoder"].weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_encoder(nn.Sequential(nn.Linear(3, 2)), str(tmp_path / "best.pt"), Provenance(**FACTS))


def test_weights_of_one_channel_give_the_same_features_in_a_network_of_two(tmp_path: Path):
    size = {"image_size": (24, 24, 24), "frames": 2, "embed_dim": 4, "depths": (1, 1)}
    one, two = SwinMambaEncoder(**size), SwinMambaEncoder(**size, in_channels=2)
    facts = FACTS | {"network": one.size}
    network = nn.ModuleDict({"encoder": one})
    save_checkpoint({"network": network, "provenance": Provenance(**facts)}, tmp_path / "best.pt")
    ours = Provenance(**facts | {"network": two.size, "normalisation": FACTS["normalisation"] | {"mode": "both"}})
    load_encoder(two, str(tmp_path / "best.pt"), ours)
    image = torch.randn(1, 2, 24, 24, 24, 2)
    assert torch.equal(two(image), one(image[:, :1]))
    assert two.second_embedding.weight.requires_grad
    voxel = Provenance(**facts | {"normalisation": FACTS["normalisation"] | {"mode": "voxel"}})
    with pytest.raises(InputError, match="normalisation#mode 'run', but here it is 'voxel'"):
        load_encoder(SwinMambaEncoder(**size), str(tmp_path / "best.pt"), voxel)


def test_random_keeps_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    encoder = nn.Linear(3, 2)
    before = encoder.weight.clone()
    load_encoder(encoder, "random", Provenance(**FACTS))
    assert torch.equal(encoder.weight, before)
    assert "RANDOM" in caplog.text


def test_published_weights_warn_that_their_participants_are_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    network = nn.ModuleDict({"encoder": nn.Linear(3, 2)})
    facts = Provenance(published="sha", network=FACTS["network"], normalisation={"mode": "run", "per_frame": False})
    save_checkpoint({"network": network, "provenance": facts}, tmp_path / "p.pt")
    load_encoder(nn.Linear(3, 2), str(tmp_path / "p.pt"), Provenance(**FACTS))
    assert "participants they have seen is not known" in caplog.text


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"weight": torch.zeros(2)}])
def test_foreign_checkpoints_are_refused(tmp_path: Path, content: dict):
    write_checkpoint(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds no provenance"):
        load_network(nn.Linear(1, 1), tmp_path / "x.pt", Provenance(**FACTS))


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path):
    save_checkpoint({"network": nn.Linear(1, 1), "provenance": Provenance(seed=0)}, tmp_path / "old.pt")
    with pytest.raises(InputError, match="written by an earlier version"):
        load_network(nn.Linear(1, 1), tmp_path / "old.pt", Provenance(**FACTS))
