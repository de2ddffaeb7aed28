"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """An input that cannot be used.

    The message is one sentence that names the file, what is wrong with it, and what to do; command-line
    tools print it without a traceback and exit with a status that is not 0.
    """
