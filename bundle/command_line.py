"""What MONAI's command line does not do itself: every config begins with `begin`."""

import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import monai.bundle
import torch
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

from bundle.errors import InputError, input_error_in
from bundle.files import ROOT


def begin() -> None:
    """Entry of every config's `initialize`.

    A problem with the user's input ends in one sentence, as in `python -m scripts`, not in MONAI's traceback of it.
    An option that no config knows is refused; MONAI would take it for a new entry, which nothing reads.

    Does nothing where a config is run by Python code.

    Raises:
        InputError: the command line sets an unknown entry.
    """
    if Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py"):
        sys.excepthook = _one_sentence
        refuse_unknown_options(sys.argv[1:])


def refuse_unknown_options(arguments: Sequence[str]) -> None:
    """Refuse `--name` that is neither MONAI's nor an entry of the given configs or of one of this bundle's.

    Args:
        arguments: of `python -m monai.bundle`, from the word `run` on.

    Raises:
        InputError: such an option; names the nearest that exist.
    """
    options: dict[str, Any] = {}
    for name, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if name.startswith("--"):
            name, equals, value = name[2:].partition("=")
            options[name] = DefaultParseValue(value if equals else following)  # as Fire, MONAI's command line, reads it
    if "args_file" in options:
        options = ConfigParser.load_config_file(options["args_file"]) | options
    known = set(inspect.signature(monai.bundle.run).parameters)
    given = options.get("config_file", [])
    files = given.split(",") if isinstance(given, str) else given
    for file in (*files, *(ROOT / "configs").glob("*.json"), *(ROOT / "configs" / "masks").glob("*.json")):
        known |= {_top(name) for name in ConfigParser.load_config_file(file)}
    for name in options:
        if _top(name) not in known:
            near = difflib.get_close_matches(name, known, n=2)
            advice = f"did you mean --{' or --'.join(near)}?" if near else "see the first lines of the config"
            raise InputError(f"--{name}: no config has such an entry, so it would do nothing; {advice}")


def _top(name: str) -> str:
    """The entry at the top that a name such as `train#trainer#max_epochs` or `+train` is about."""
    return re.split("#|::", name.lstrip("+"))[0]


def _one_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the `InputError` that MONAI has wrapped; anything else as Python prints it.

    One of several training processes then ends at once. After an error MONAI calls no `finalize`, so that the usual end
    of Python could abort (see `bundle.training.distributed.leave_group`), or wait for threads that wait for the other
    processes. PyTorch's own hook around this one puts a buffer in the place of `sys.stderr`, which would be lost.
    """
    cause = input_error_in(error)
    text = "".join(traceback.format_exception(kind, error, trace)) if cause is None else f"error: {cause}\n"
    print(text, end="", file=sys.__stderr__, flush=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(1)
