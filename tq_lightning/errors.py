"""The one exception a user meets: a sentence that says what was got and what to pass instead."""


class UserError(ValueError):
    """Bad input from the user (a key, a path, a value, a file).

    The command line prints its message as one line and exits with status 2; a library caller sees a `ValueError`.
    """


class TrainingError(RuntimeError):
    """A run that can't go on (a non-finite loss, a weight that turned NaN).

    The command line prints its message as one line and exits with status 1; the run's record keeps it as the reason.
    """
