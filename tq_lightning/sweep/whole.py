"""Files that are written whole or not at all, by however many writers at a time."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to inside the block; what lies there then takes the place of `path`, or goes where the block fails.

    Commands that share a sweep's folder see it settle at the same moment: each writer has a name of its own.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
