"""Factories: functions of user packages, named `package.module:function`.

A factory is imported only if the user passes its name, never from the content of a file:
`only_allow` guards all code that builds a model or a data set for a checkpoint or a packed file.
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
_HUBS = ("hf_hub:", "local_dir:")  # timm's own prefixes
# (name that may be imported, file that is read); None outside of a guard
_guard: ContextVar[tuple[str | None, str] | None] = ContextVar("_guard", default=None)


def is_factory(name: Any) -> bool:
    """Return True if a name has the form `package.module:function`."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not name.startswith(_HUBS)


@contextmanager
def only_allow(name: str | None, path: Any) -> Iterator[None]:
    """Reject every factory except `name` inside the block, which reads the file `path`."""
    token = _guard.set((name, str(path)))
    try:
        yield
    finally:
        _guard.reset(token)


def call_factory(name: str, key: str, /, **arguments: Any) -> Any:
    """Import a factory and call it.

    Args:
        name: `package.module:function`. The current directory is searched too.
        key: option with this name, for messages.
        **arguments: arguments of the factory. `num_classes` is dropped if the factory has no such
            parameter.

    Raises:
        UserError: the factory can't be imported, is not callable, does not accept the arguments or
            fails; or a file names it but the caller does not.
    """
    guard = _guard.get()
    if guard is not None and guard[0] != name:
        raise UserError(
            f"{guard[1]} names the factory {name!r}, which is not imported automatically; pass "
            f"--model.name {name} (in Python, model={name!r} or the network itself)"
        )
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's: it may raise anything
        raise UserError(
            f"{key}={name}: can't import it ({type(error).__name__}: {first_line(error)}); pass "
            "package.module:function of an installed package or of the current directory"
        ) from error
    if not callable(found):
        raise UserError(f"{key}={name}: got a {type(found).__name__}, pass a function")
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
        unknown = (
            key == "model.name"
            and "num_classes" not in arguments
            and isinstance(error, TypeError)
            and "num_classes" in str(error)
        )
        hint = "; the number of classes is not known, pass model.num_classes" * unknown
        raise UserError(
            f"{key}={name}: the call with {given} raised {type(error).__name__}: "
            f"{first_line(error)}{hint}"
        ) from error
