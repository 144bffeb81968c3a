"""The argument parser of all verbs but Lightning's: wrong arguments are one line, as every other error."""

import argparse
from typing import Any, NoReturn

from tq_lightning.errors import UserError


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are a `UserError` and whose options can't be abbreviated."""

    def __init__(self, verb: str, **kwargs: Any) -> None:
        super().__init__(prog=f"python -m tq_lightning {verb}", allow_abbrev=False, **kwargs)
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`; the command line prints it and exits with status 2."""
        raise UserError(f"{self.verb}: {message}; --help lists the arguments")
