"""Exceptions that users see, and parts of their messages.

A message is one line without passwords: what was got, and what to pass instead.
"""

import difflib
import errno
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

_KEY = r"\w*(?:password|passwd|pwd)="
# scheme://user:PASSWORD@host. A password may contain "/", "@" and "%". It ends at the last "@"
# before white space or before ?password=, or, if it contains white space, at the next "@" of the
# line before a host. In scheme://user:TEXT?password=..., TEXT is part of a password unless it is a
# port number.
_IN_AUTHORITY = re.compile(
    rf"(\w[\w+.-]*://[^\s:/@]*):(?:(?:(?![?&]{_KEY})\S)*@"
    rf"|(?:(?![?&]{_KEY})[^\n])*?@(?=[^\s@/?]*(?:[/?\s]|$))|(?!\d*\?)[^\s@/]*(?=\?{_KEY}))",
    re.I,
)
# ?password=PASSWORD and &sslpassword=PASSWORD of a URL end at "&" or white space, and
# password=PASSWORD of a connection string at white space or its quote. Punctuation that follows
# belongs to the text.
_END = r"""(?=['")\],;.]*(?:\s|$))"""
_IN_QUERY = re.compile(rf"([?&]{_KEY})[^\s&]*?(?=&|{_END})", re.I)
_IN_STRING = re.compile(rf"""((?:^|[;\s'"(]){_KEY})('(?:\\.|[^'\\])*'|(?!')\S*?{_END}|'.*)""", re.I)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks, terminal escapes


class UserError(ValueError):
    """Bad input from the user (a key, a path, a value, a file).

    The command line prints the message as one line and exits with status 2. Library callers can
    catch it as a `ValueError`.
    """


class TrainingError(RuntimeError):
    """A training that cannot continue, e.g. because of a non-finite loss or weight.

    The command line prints the message as one line and exits with status 1. The record of the run
    stores it as the reason.
    """


class Interrupted(BaseException):
    """A signal ended the command. Not an `Exception`, so that error handlers do not catch it.

    Args:
        signum: the signal; the exit status is 128 + signum.
        requeue: True if a fit saved its state and the job should be requeued.
    """

    def __init__(self, signum: int, requeue: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.requeue = signum, requeue
        self.status = 128 + signum


def file_error(error: OSError) -> UserError | None:
    """Return the `UserError` for a file that can't be read or written; None for other errors.

    This includes a full or read-only disk, whose error may not name the file.
    """
    disk = (errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", None))  # none on Windows
    if error.filename is None and error.errno not in disk:
        return None
    where = f" {error.filename}" if error.filename else ""
    return UserError(f"cannot read or write{where}: {error.strerror or error}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without passwords; its class if it is empty."""
    return hide_password((str(error).splitlines() or [type(error).__name__])[0])


def one_line(text: object) -> str:
    """Return a text with its control characters, such as line breaks in a file name, as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def message_of(error: object, limit: int | None = None) -> str:
    """Return the message of an error in one line, of at most `limit` characters.

    Unlike `first_line`, it keeps all lines and does not mask passwords; pass its result to
    `hide_password` if it may contain a URL.
    """
    return " ".join(str(error).split())[:limit]


def hide_password(text: str) -> str:
    """Replace the passwords of all URLs in a text by `***`.

    Args:
        text: a storage URL, or a text that contains URLs, such as the message of a database driver
            or a command line.

    Example:
        >>> hide_password("cannot reach postgresql://me:se/cr@t@host/db?sslpassword=x")
        'cannot reach postgresql://me:***@host/db?sslpassword=***'
    """
    text = _IN_AUTHORITY.sub(r"\1:***@", text)
    return _IN_STRING.sub(r"\1***", _IN_QUERY.sub(r"\1***", text))


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return "; did you mean X, Y?" with the names in `known` that are close to `name`, or ""."""
    close = difflib.get_close_matches(str(name), list(known), n=count)
    return f"; did you mean {', '.join(close)}?" if close else ""


def program_name() -> str:
    """Return the name of the program as the user started it, for usage lines and hints."""
    if Path(sys.argv[0]).stem == "tq-lightning":
        return "tq-lightning"
    return "python -m tq_lightning"
