"""TODO training/cli_messages.py."""

import difflib
import inspect
import re

from lightning.pytorch import Trainer

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.training.module import TQModule


def one_line(error: BaseException) -> str:
    """An error's text as one line; for an argument nobody knows, with the one that was probably meant."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = _wrong_kind(" ".join(lines))[:600] if lines else type(error).__name__
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", text)
    if unknown:
        keys = [
            f"{group}.{key}"
            for group, owner in _OWNERS.items()
            for key in inspect.signature(owner).parameters
        ]
        near = difflib.get_close_matches(unknown[1], keys, n=3)
        text += (
            f"; did you mean --{', --'.join(near)}?" if near else "; fit --help lists the arguments"
        )
    return text


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "{key: value}",
}


def _wrong_kind(text: str) -> str:
    """jsonargparse's page on a value of the wrong type as "key: got value, pass kinds"; other texts as they are."""
    key = re.match(r'Parser key "([\w.]+)": ', text)
    kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[([^]]*)\])", text)
    given = re.search(r"(?:Given|Got) value: (.*)$", text)
    if not key or not kinds or not given or text.count("Expected a") != len(kinds):
        return text
    wanted = [_KINDS.get(kind, kind) or values for kind, values in kinds]
    return f"{key[1]}: got {given[1]!r}, pass {' or '.join(dict.fromkeys(wanted))}"


_OWNERS = {"model": TQModule, "data": TQDataModule, "trainer": Trainer}
