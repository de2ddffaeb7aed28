"""The one exception that means "your input, not our bug"."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """An input that cannot be used.

    The message is one sentence that names the file, what is wrong with it, and what to do; command-line
    tools print it without a traceback and exit with a status that is not 0.
    """


def input_error_in(error: BaseException | None) -> InputError | None:
    """The `InputError` that an error is, or was raised from; None if there is none."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the `InputError` itself where MONAI has wrapped it, as it does for entries of a config."""
    try:
        yield
    except RuntimeError as error:
        if (cause := input_error_in(error)) is None:
            raise
        raise cause from None
