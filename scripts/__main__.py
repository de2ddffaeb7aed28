"""`python -m scripts COMMAND --help`: see the README for the order in which the commands are used."""

import logging
import sys
from collections.abc import Callable
from functools import partial, wraps

import fire

from bundle.errors import InputError
from scripts.commands import convert, export, overlay, preflight, prepare, regions, release, splits, synthesize
from scripts.demo import demo
from scripts.experiments import report, sweep, truth

COMMANDS: dict[str, Callable] = {
    "demo": demo,
    "synthesize": synthesize,
    "preflight": preflight,
    "prepare": prepare,
    "export": export,
    "splits": splits,
    "regions": regions,
    "overlay": overlay,
    "convert": convert,
    "release": release,
    "sweep": sweep,
    "report": report,
    "truth": truth,
}


def main() -> None:
    """Run one command; a problem with the user's input is one sentence on stderr and exit status 1."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    wanted: list[Callable] = []

    def later(command: Callable) -> Callable:
        @wraps(command)
        def remember(*values: object, **flags: object) -> None:
            wanted.append(partial(command, *values, **flags))

        return remember

    try:
        # Fire calls first and looks for unknown flags afterwards: hours of work would be done without a misspelt one
        fire.Fire({name: later(command) for name, command in COMMANDS.items()}, name="scripts")
        for call in wanted:
            call()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
