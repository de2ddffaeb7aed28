"""`python -m scripts.benchmarks [SECTION] [--quick]`: table (the default), gpu, scaling, memory, ... or report."""

import logging
import sys

import fire

from bundle.errors import InputError
from scripts.benchmarks.background import background
from scripts.benchmarks.floor import floor
from scripts.benchmarks.formats import formats
from scripts.benchmarks.gpu import gpu, profile
from scripts.benchmarks.kernels import kernels
from scripts.benchmarks.launches import launches
from scripts.benchmarks.many_runs import many_runs
from scripts.benchmarks.redundancy_effect import redundancy_effect
from scripts.benchmarks.report import report
from scripts.benchmarks.scaling import memory, scaling
from scripts.benchmarks.table import table
from scripts.benchmarks.ways import augmentation, redundancy


def main() -> None:
    """Run one command; its result is Markdown on standard output."""
    logging.basicConfig(level=logging.WARNING)
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in {"-h", "--help"}):
        arguments = ["table", *arguments]
    commands = {
        "table": table,
        "gpu": gpu,
        "profile": profile,
        "scaling": scaling,
        "memory": memory,
        "background": background,
        "floor": floor,
        "formats": formats,
        "kernels": kernels,
        "launches": launches,
        "augmentation": augmentation,
        "many_runs": many_runs,
        "redundancy": redundancy,
        "redundancy_effect": redundancy_effect,
        "report": report,
    }
    # the table prints each line as soon as it is measured, the others all at the end
    try:
        fire.Fire(
            commands,
            arguments,
            name="scripts.benchmarks",
            serialize=lambda text: None if arguments[0] == "table" else text,
        )
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
