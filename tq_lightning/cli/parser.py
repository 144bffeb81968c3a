"""The argparse parser of the verbs that LightningCLI does not parse.

A wrong argument raises a one-line `UserError`, and `~` is expanded in paths.
"""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from tq_lightning.errors import UserError, did_you_mean, program_name
from tq_lightning.files import expand_path


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` for one verb, without abbreviations.

    Args:
        verb: the verb, for the usage line and for errors.
        stray: what to pass instead of a surplus argument that is not an option.
        **kwargs: arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, verb: str, stray: str = "", **kwargs: Any) -> None:
        super().__init__(prog=f"{program_name()} {verb}", allow_abbrev=False, **kwargs)
        self.verb, self.stray = verb, stray
        self.register("type", Path, _path)  # type=Path expands ~

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`; the command line prints it and exits with status 2."""
        unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        if unknown.startswith("--") and message.startswith("unrecognized"):
            message += did_you_mean(unknown, self._option_string_actions)
        elif message.startswith("unrecognized") and self.stray:
            message += f"; {self.stray}"
        raise UserError(f"{self.verb}: {message}; {self.prog} --help lists the options")


def _path(text: str) -> Path:
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
