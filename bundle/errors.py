"""The one exception that means "your input, not our bug"."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

_RAISED = re.compile(r"^bundle\.\w+\.(?:InputError|WriteError): (.+)$", re.MULTILINE)


class InputError(ValueError):
    """An input that cannot be used.

    The message is one sentence that names the file, what is wrong with it, and what to do; command-line
    tools print it without a traceback and exit with a status that is not 0.
    """


def input_error_in(error: BaseException | None) -> InputError | None:
    """The `InputError` that an error is, or was raised from; None if there is none.

    A loader's worker hands on no more than text, from which the sentence is taken. A full disk makes one, too.
    """
    while error is not None:
        if "Original Traceback" in str(error) and (said := _RAISED.search(str(error))):
            return InputError(said[1])
        if isinstance(error, InputError):
            return error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(f"{error.filename or 'a file'} cannot be written ({error.strerror}); free space")
        error = error.__cause__
    return None


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the `InputError` itself where MONAI has wrapped it, as it does for entries of a config."""
    try:
        yield
    except RuntimeError as error:
        if (cause := input_error_in(error)) is None:
            raise
        raise cause from None
