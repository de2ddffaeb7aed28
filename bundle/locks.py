"""Locks that keep other processes out while one is at work."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle.errors import InputError


@contextmanager
def locked(path: Path, patience_s: float = 5.0) -> Iterator[int]:
    """Hold an exclusive lock on a file, made if absent; give its file descriptor.

    The lock is `flock`'s: it ends with the processes that hold the descriptor, however they end, so that none is ever
    left behind. A process that the descriptor is passed to holds the lock too, even if it outlives the one that took
    it. It keeps out the threads and processes of this machine. It keeps out those of other machines where the file
    system carries locks between them, as NFS on Linux does unless mounted with `nolock` or `local_lock`.

    Args:
        path: the file; it stays, empty, since deleting it would free the name while another waits for it.
        patience_s: wait as long, in seconds, for a process that is just being killed.

    Raises:
        InputError: another process holds the lock, or the file system has none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise InputError(f"{path} is locked by a process at work; run again when it has ended") from error
                time.sleep(0.1)
            except OSError as error:
                raise InputError(
                    f"{path} cannot be locked ({error.strerror}); use a folder on a file system with locks"
                ) from error
        yield file.fileno()
