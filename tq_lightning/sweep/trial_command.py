"""The `command` of a sweep file: the arguments of `fit` and the variables it sets.

W&B's agents start the command as it stands. The workers of a study run `fit` themselves, so a
launcher in front of the program would have no effect, and is refused.
"""

import os
import re
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError

EXAMPLE = '["${env}", python, -m, tq_lightning, fit, --config, FILE, "${args}"]'
# how the program is named in a command
_FIT = (["-m", "tq_lightning", "fit"], ["tq-lightning", "fit"])
_SETTING = re.compile(r"[A-Za-z_]\w*=")  # NAME=VALUE
_ENV = ("env", "/usr/bin/env", "${env}")


def read_command(command: Any, path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the arguments of `fit` before ${args}, and the NAME=VALUE words before the program.

    Raises:
        UserError: the command does not run `fit`, or does more than that.
    """
    where = f"{path}: command"
    if not isinstance(command, list) or command[-1:] != ["${args}"] or command.count("${args}") > 1:
        raise UserError(
            f"{where}: expected a list that ends in ${{args}}, e.g. {EXAMPLE}; got {command!r}"
        )
    words = [
        re.sub(r"\$\{envvar:(\w+)\}", lambda m: os.environ.get(m[1], m[1]), str(word))
        for word in command[:-1]
    ]
    program = _program(words)
    if program is None:
        raise UserError(
            f"{where}: expected {EXAMPLE}, got {command!r}; each trial runs `tq_lightning fit`"
        )
    before, after = words[: program[0]], words[program[1] :]
    settings = [word.split("=", 1) for word in before if _SETTING.match(word)]
    for word in before:
        if not (_SETTING.match(word) or word in _ENV or _is_python(word)):
            raise UserError(
                f"{where}: {word!r} is not supported before the program, because the workers of "
                "the sweep run `fit` themselves; use only ${env}, NAME=VALUE and python there, and "
                "set devices with trainer.devices"
            )
    # --wandb is for W&B's agents. With Optuna, the study stores the curves. --wandb can still be
    # passed after -- on the command line.
    arguments = [word for word in after if word != "--wandb"]
    for word in arguments:
        if word.startswith("${"):
            raise UserError(
                f"{where}: {word} is not supported after `fit`; use only ${{args}}, at the end"
            )
    return tuple(arguments), dict(settings)


def _program(words: list[str]) -> tuple[int, int] | None:
    """Return where the words of the program start and end."""
    for i in range(len(words)):
        for fit in _FIT:
            if [Path(words[i]).name, *words[i + 1 : i + len(fit)]] == fit:
                return i, i + len(fit)
    return None


def _is_python(word: str) -> bool:
    """Return True for an interpreter and its options, e.g. python3.12 and -u."""
    name = Path(word).name
    return word.startswith(("-", "${interpreter}")) or bool(re.fullmatch(r"python[\d.]*", name))
