"""The exceptions a user meets, and how their text is shown: one line, without passwords."""

import re

# scheme://user:PASSWORD@host. A password may hold "/", "@" and "%": it ends at the last "@" before white space, and if
# it holds white space itself, at the next "@" of the line.
_IN_AUTHORITY = re.compile(r"(\w[\w+.-]*://[^\s:/@]*):(\S*@|[^@\n]*@)")
# ?password=PASSWORD and &sslpassword=PASSWORD of a URL, password=PASSWORD of a connection string
_IN_QUERY = re.compile(
    r"((?:^|[?&;\s'\"(])\w*(?:password|passwd|pwd)=)('[^']*'|[^\s&;'\")]*)", re.I
)


class UserError(ValueError):
    """Bad input from the user (a key, a path, a value, a file).

    The message is one line that says what was got and what to pass. The command line prints it and exits with status 2; a
    library caller sees a `ValueError`.
    """


class TrainingError(RuntimeError):
    """A run that cannot continue (a non-finite loss, a weight that turned NaN).

    The command line prints its message as one line and exits with status 1; the run's record keeps it as the reason.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message without passwords, or the name of its class if the message is empty."""
    return hide_password((str(error).splitlines() or [type(error).__name__])[0])


def hide_password(text: str) -> str:
    """Replace the passwords of all URLs in a text by `***`.

    Args:
        text: a storage URL, or a text that contains some, such as the message of a database driver or a command line.

    Example:
        >>> hide_password("cannot reach postgresql://me:se/cr@t@host/db?sslpassword=x")
        'cannot reach postgresql://me:***@host/db?sslpassword=***'
    """
    return _IN_QUERY.sub(r"\1***", _IN_AUTHORITY.sub(r"\1:***@", text))
