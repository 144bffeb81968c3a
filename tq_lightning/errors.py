"""The one exception a user meets: a sentence that says what was got and what to pass instead."""


class UserError(ValueError):
    """Bad input from the user (a key, a path, a value, a file).

    The command line prints its message as one line and exits with status 2; a library caller sees a `ValueError`.
    """
