"""Factories: functions of the user's own packages, named `package.module:function`.

A name is imported because the user passes it, never because a file says so: `only_allow` guards
everything that builds a model or a data set on behalf of a checkpoint or a packed file.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tq_lightning.errors import UserError, first_line

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_HUBS = ("hf_hub:", "local_dir:")  # prefixes of timm's own
# (name that may be imported, file that is read), None outside of a guard
_guard: ContextVar[tuple[str | None, str] | None] = ContextVar("_guard", default=None)


def is_factory(name: Any) -> bool:
    """Tell whether a name is `package.module:function`."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not name.startswith(_HUBS)


@contextmanager
def only_allow(name: str | None, path: Any) -> Iterator[None]:
    """Refuse every factory but `name` inside the block, which reads the file `path`."""
    token = _guard.set((name, str(path)))
    try:
        yield
    finally:
        _guard.reset(token)


def call_factory(name: str, key: str, /, **arguments: Any) -> Any:
    """Import a factory and call it.

    Args:
        name: `package.module:function`. The current directory is searched too.
        key: The option that it was given for, for messages.
        **arguments: Arguments of the factory. `num_classes` is left out if it has no such
            parameter.

    Raises:
        UserError: It can't be imported, is not callable, refuses the arguments or fails; or a file
            names it and the caller does not.
    """
    guard = _guard.get()
    if guard is not None and guard[0] != name:
        raise UserError(
            f"{guard[1]} names the factory {name!r}, which is imported only if you name it: pass "
            f"the same name, or the network itself as model="
        )
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's: it may raise anything
        raise UserError(
            f"{key}={name}: can't import it ({type(error).__name__}: {first_line(error)}); pass "
            "package.module:function, importable from here"
        ) from error
    if not callable(found):
        raise UserError(f"{key}={name}: it is a {type(found).__name__}, not a function")
    try:
        parameters = inspect.signature(found).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "num_classes" not in parameters and not takes_any:
            arguments.pop("num_classes", None)
        return found(**arguments)
    except UserError:
        raise
    except Exception as error:
        given = ", ".join(f"{k}={v!r}" for k, v in arguments.items()) or "no arguments"
        raise UserError(
            f"{key}={name}: called with {given}, it raises {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
