"""Print the names of the threads that a process still has at its end, as Linux lists them."""

import atexit
from pathlib import Path


def list_threads() -> None:
    """Do so when Python ends, after what is registered later."""
    atexit.register(_print_threads)


def _print_threads() -> None:
    names = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    print("at the end", names)  # noqa: T201
