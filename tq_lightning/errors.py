"""The exceptions a user meets: a sentence that says what was got and what to pass instead."""


class UserError(ValueError):
    """Bad input from the user (a key, a path, a value, a file).

    The command line prints its message as one line and exits with status 2; a library caller sees a `ValueError`.
    """


class TrainingError(RuntimeError):
    """A run that can't go on (a non-finite loss, a weight that turned NaN).

    The command line prints its message as one line and exits with status 1; the run's record keeps it as the reason.
    """


def first_line(error: BaseException) -> str:
    """What an error says, but for its further lines; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
