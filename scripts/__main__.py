"""`python -m scripts COMMAND --help`: see the README for the order in which the commands are used."""

import logging
import sys

import fire

from bundle.errors import InputError
from scripts.commands import convert, export, overlay, preflight, prepare, regions, release, splits, synthesize
from scripts.demo import demo
from scripts.experiments import report, sweep, truth

COMMANDS = {
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
    try:
        fire.Fire(COMMANDS, name="scripts")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
