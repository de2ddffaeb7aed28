"""`python -m scripts COMMAND --help`: docs/code.md lists them."""

import inspect
import logging
import sys
from collections.abc import Callable
from functools import partial, wraps
from inspect import Parameter
from typing import Any, get_args, get_type_hints

import fire

from bundle.errors import InputError
from scripts.commands import (
    convert,
    dicom,
    export,
    overlay,
    paint,
    pictures,
    preflight,
    prepare,
    regions,
    splits,
    synthesize,
    where,
)
from scripts.demo import demo, example
from scripts.experiments import downstream, dynamics, one_run, report, sweep, truth
from scripts.serving import app, audit, embed, export_model, maps, package, release, results

fire.decorators.FIRE_METADATA = "_read_as"  # where Fire keeps parsers on a command: a name that --help does not list

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "example": example,
    "synthesize": synthesize,
    "paint": paint,
    "dicom": dicom,
    "preflight": preflight,
    "prepare": prepare,
    "export": export,
    "export_model": export_model,
    "package": package,
    "embed": embed,
    "maps": maps,
    "splits": splits,
    "regions": regions,
    "overlay": overlay,
    "convert": convert,
    "release": release,
    "app": app,
    "audit": audit,
    "results": results,
    "sweep": sweep,
    "report": report,
    "truth": truth,
    "dynamics": dynamics,
    "downstream": downstream,
    "one_run": one_run,
    "where": where,
    "pictures": pictures,
}


def _typed(command: Callable) -> Callable:
    """Have Fire read a command's values by its annotations: a run or site named 1 stays text, --folds x is refused."""

    def number(name: str, kind: type) -> Callable[[str], Any]:
        def parse(text: str) -> Any:
            try:
                return kind(text)
            except ValueError as error:
                raise InputError(f"--{name} must be a number, not {text!r}") from error

        return parse

    parameters = inspect.signature(command).parameters
    for name, hint in get_type_hints(command).items():
        kinds = set(get_args(hint) or [hint]) - {type(None)}
        if name in parameters and parameters[name].kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            fire.decorators.SetParseFn(hint)(command)
        elif kinds == {str}:
            fire.decorators.SetParseFns(**{name: str})(command)
        elif kinds in ({int}, {float}):
            fire.decorators.SetParseFns(**{name: number(name, *kinds)})(command)
    return command


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
        fire.Fire({name: later(_typed(command)) for name, command in COMMANDS.items()}, name="scripts")
        for call in wanted:
            call()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
