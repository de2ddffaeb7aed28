"""Trainings in processes of their own, to be killed: the command line of MONAI, without its seconds of imports."""

import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from tiny_configs import CONFIGS, ROOT, TINY

import bundle.command_line
import bundle.evaluation.subjects
import bundle.heads.mean
import bundle.masking.transforms
import bundle.networks.compiled
import bundle.networks.masked_autoencoder
import bundle.training.checkpoints
import bundle.training.metrics
import bundle.training.provenance
import bundle.training.reports
from bundle.training.checkpoints import load_checkpoint

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainings"])  # has imported all this, and runs nothing itself
PATIENCE_S = 300
"""Of tests on a busy machine; what is waited for comes in a few seconds."""


class At:
    """Handler that does something at an engine's event of a given number, once.

    Args:
        event: name of one of `ignite.engine.Events`.
        count: at which occurrence, from 1.
        action: what is done.
    """

    def __init__(self, event: str, count: int, action: Callable[[], Any]) -> None:
        self.event, self.count, self.action = event, count, action

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        engine.add_event_handler(Events[self.event](once=self.count), lambda: self.action())


def signal_self(number: int) -> Callable[[], None]:
    """An action: this process gets a signal."""
    return lambda: os.kill(os.getpid(), number)


def unlink(path: str) -> Callable[[], None]:
    """An action: a link goes."""
    return lambda: Path(path).unlink()


def limit_files(size: int) -> Callable[[], None]:
    """An action: from now on no file of this process can be longer, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def at(part: str, event: str, count: int, action: str, **details: object) -> dict[str, object]:
    """Entries of a config: an action at an event of the trainer ("train") or of the validator ("validate").

    They stand in the place of reports, which cannot shape weights.
    """
    target = {"_target_": f"trainings.{action}", **details}
    return {f"{part}#reports": [{"_target_": "trainings.At", "event": event, "count": count, "action": target}]}


def arguments(run_id: str, configs: list[str], **settings: object) -> list[str]:
    """What follows `python -m monai.bundle`, with a tiny network."""
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    options = TINY | {"bundle_root": ROOT} | settings
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    logs = ["--logging_file", str(CONFIGS / "logging.conf")]
    return ["run", run_id, "--config_file", str(files), *logs, *given]


def start(log: Path, given: list[str], **environment: str) -> Any:
    """Begin a training in a process of its own, which writes to a log."""
    process = SERVER.Process(target=_command, args=(str(log), given, environment))
    process.start()
    return process


def use_plain_scan() -> None:
    """Where the compiled scan is installed too, as the tests' own process does: the two scans differ in their bits."""
    bundle.networks.compiled.library = lambda: None


def _command(log: str, given: list[str], environment: dict[str, str]) -> None:
    with open(log, "ab") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    os.environ.update(environment)
    torch.set_num_threads(1)
    use_plain_scan()
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as without this server
    sys.argv = ["monai.bundle", *given]
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except Exception:  # noqa: BLE001 - what Python itself does, and multiprocessing does not
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def overlay(folder: Path, **entries: object) -> str:
    """Write a config, and return its name for `arguments` and `tiny_configs.run`."""
    (folder / "overlay.json").write_text(json.dumps(entries))
    return str(folder / "overlay")


def wait_until(happened: Callable[[], bool], process: Any) -> bool:
    """Wait for something, or for the end of the process; True if it happened."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        if process.exitcode is not None:
            return happened()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    return True


def same_checkpoint(one: Path, two: Path) -> None:
    """Two checkpoints hold the same bits."""
    first, second = load_checkpoint(one), load_checkpoint(two)
    first.pop("provenance"), second.pop("provenance")  # names other folders
    _same(first, second, "")


def _same(one: Any, two: Any, name: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), name
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), name
        for key in one:
            _same(one[key], two[key], f"{name}#{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), name
        for number, (first, second) in enumerate(zip(one, two, strict=True)):
            _same(first, second, f"{name}#{number}")
    else:
        assert one == two, name


def end(process: Any, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and its children, as a cluster does, and wait for its end."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for pid in [process.pid, *map(int, children.read_text().split())] if children.is_file() else [process.pid]:
        os.kill(pid, number)
    process.join(PATIENCE_S)
