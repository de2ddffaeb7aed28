"""Where work is done: in processes on this machine, or by the workers of a Dask scheduler."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from bundle.errors import InputError


@contextmanager
def parallel_map(workers: int, scheduler: str | None) -> Iterator[Callable[[Callable, Sequence, str], list]]:
    """Give a function `each(function, tasks, what)` that maps over tasks here, in processes, or on Dask's workers.

    On Linux the processes end with the one that called this, also where it is killed: they would wait for ever.

    Raises:
        InputError: Dask is not installed or does not answer, or a worker was killed.
    """

    def each(function: Callable, tasks: Sequence, what: str) -> list:
        results = executor.map(function, tasks) if executor else map(function, tasks)
        # smoothing 0, the mean rate: runs that began together end together, which misleads a recent rate
        return list(tqdm(results, total=len(tasks), desc=what, unit="run", smoothing=0))

    with ExitStack() as stack:
        executor: Any = None
        deaths: tuple[type[Exception], ...] = (BrokenExecutor,)
        if scheduler is not None:
            executor, killed = stack.enter_context(dask_executor(scheduler))
            deaths = (BrokenExecutor, killed)
        elif workers > 1:
            pool = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
            )
            executor = stack.enter_context(pool)
        try:
            yield each
        except deaths as error:
            raise InputError(
                "a worker process ended abruptly, most likely out of memory; run again with fewer workers, "
                "finished runs are kept"
            ) from error


def _end_with(parent: int) -> None:
    """Have the system kill this worker when the process that started it ends; files are written whole or not at all."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def dask_executor(scheduler: str) -> Iterator[tuple[Executor, type[Exception]]]:
    """Give an executor on a Dask scheduler's workers, and what it raises when they die.

    Raises:
        InputError: Dask is not installed, or no scheduler answers.
    """
    try:
        from dask.distributed import Client, KilledWorker
    except ImportError as error:
        raise InputError("--scheduler needs Dask; install it with `pip install distributed`") from error
    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {scheduler} ({error}); check the address") from error
    with client:
        # pure=False: a task of an earlier call, whose files have changed since, must not be taken for this one
        yield client.get_executor(pure=False), KilledWorker


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, the garbage collector rests, and afterwards it takes what there is by then for old.

    For the records of many runs: millions of small objects without cycles, that it would walk through again and again.
    Frozen for good, as by `gc.freeze` alone, whatever else lives by then would never be collected: a network, its
    memory on a GPU, the threads of its group.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # both: from the young generations to the oldest, with no walk
        if enabled:
            gc.enable()
