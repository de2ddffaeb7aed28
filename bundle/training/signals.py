"""Signals with which a cluster says that a process has to end soon: SIGTERM, and SIGUSR1 if Slurm is asked for it."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """What the main thread of a process does at `STOPPING`; other threads cannot listen, so there nothing is done."""

    def __init__(self) -> None:
        self.before: dict[signal.Signals, Any] = {}

    def listen(self, asked: Callable[[int], None]) -> None:
        """Call a function with the signal's number, between two instructions of whatever Python is doing."""
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, lambda number, _: asked(number)) for number in STOPPING}

    def ignore(self) -> None:
        """Do nothing at these signals."""
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Do again what was done before `listen`."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def end_now(number: int, message: str) -> NoReturn:
    """End the process with status 128 + a signal's number, from within the handler of that signal.

    Nothing is cleaned up: whatever was interrupted may hold locks, also those of the log, so the message goes straight
    to standard error.
    """
    os.write(2, f"{signal.Signals(number).name}: {message}\n".encode())
    os._exit(128 + number)
