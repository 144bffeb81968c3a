"""The verb `inspect`: storage and energy of a model under a policy, without training it.

A policy is the choice of widths, skipped layers, norms and scales.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tq_lightning.cli.inspect_tables import show
from tq_lightning.cli.parser import Parser
from tq_lightning.cost.record import inspect_record
from tq_lightning.errors import UserError, did_you_mean, program_name
from tq_lightning.records import InspectRecord, RecordError, read_any, write_record
from tq_lightning.training.lists import as_ints, as_list
from tq_lightning.training.yaml_file import parse_yaml, read_yaml

# model.* key -> (default, description); the same keys as in a training configuration
KEYS: dict[str, tuple[Any, str]] = {
    "name": (None, "timm model, a built-in one such as resnet20_cifar, or package.module:factory"),
    "num_classes": (None, "number of classes; null for the default of the model"),
    "model_args": ({}, "further arguments of the model, e.g. {in_chans: 1}"),
    "skip": (["first", "last"], "layers left in float: first, last, name patterns; [] for none"),
    "widths": ([8, 4, 2, 1], "trained widths"),
    "max_bits": (8, "stored width"),
    "norm": ("per_width", "per_width, per_width_all or shared"),
    "normalizer": (
        "tanh",
        "tanh, absmax or learned, each also with _channel (a scale per output channel); gaussian, "
        "float_e2, mu_law or log",
    ),
    "level": ("endpoint", "placement of codes; must be supported by the normalizer"),
    "scale": ("mean", "mean or span"),
    "quantize_embeddings": (False, "true to quantize embedding tables too"),
    "activations": (None, "activation quantizer; a learned clip counts as storage"),
}


def parser() -> Parser:
    """Build the parser of the verb."""
    p = Parser(
        "inspect",
        stray="pass the name of a model as --model.name NAME",
        description="Storage and energy of a model, without training it.",
    )
    p.add_argument(
        "--config", type=Path, help="YAML file; its model: section sets the defaults of the keys"
    )
    for key, (default, description) in KEYS.items():
        p.add_argument(
            f"--model.{key}", dest=key, metavar="V", help=f"{description} (default {default})"
        )
    p.add_argument(
        "--energy",
        action="store_true",
        help="also model the energy of an inference on two accelerators with ZigZag (minutes)",
    )
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write a record for `report`")
    return p


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], Path | None, bool]:
    """Return the policy, the path of the record, and the value of --energy."""
    given = vars(parser().parse_args(list(argv)))
    out, config, energy = (given.pop(key) for key in ("out", "config", "energy"))
    values = {key: default for key, (default, _) in KEYS.items()}
    values |= {key: value for key, value in _model_section(config).items() if key in KEYS}
    values |= {key: _value(key, text) for key, text in given.items() if text is not None}
    values["skip"] = as_list(values["skip"], "model.skip")
    values["widths"] = as_ints(values["widths"], "model.widths")
    from tq_lightning.models import check_arguments  # imports timm, which --help does not need

    check_arguments(values["model_args"])
    name = values["name"] if given["name"] is None else given["name"]
    if name is None:
        raise UserError("inspect: no model given; pass --model.name NAME")
    if not isinstance(values["name"], str) or not name:
        raise UserError(f"model.name: got {name!r}, pass the name of a model, e.g. resnet50")
    classes = values["num_classes"]
    if classes is not None and (type(classes) is not int or classes < 0):
        raise UserError(f"model.num_classes: got {classes!r}, pass an integer >= 0 or null")
    if out is not None and (out.suffix != ".json" or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out}: pass a file that ends in .json, in a folder that exists")
    if out is not None and out.exists():
        _check_replaceable(out)
    return values, out, energy


def _check_replaceable(out: Path) -> None:
    """Raise UserError if `out` is not the record of an earlier `inspect`."""
    try:
        earlier = isinstance(read_any(out), InspectRecord)
    except RecordError:
        earlier = False
    if not earlier:
        raise UserError(f"--out {out} is not a record of inspect; pass a new file")


class SimulationProgress:
    """Print the progress of simulations to stderr: one line that changes, or one per tenth."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Print the number of finished simulations and the time left."""
        seconds = (time.monotonic() - self.start) * (total - done) / done
        line = f"simulated {done} of {total} layers, {timedelta(seconds=round(seconds))} left"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif 10 * done // total > 10 * (done - 1) // total:
            print(line, file=sys.stderr, flush=True)


def _value(key: str, text: str) -> Any:
    return None if text == "None" else parse_yaml(text, f"--model.{key}")


def _model_section(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = read_yaml(path)
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"--config {path}: no model: section")
    from tq_lightning.training.cli_messages import known_keys  # imports Lightning

    known = [key.removeprefix("model.") for key in known_keys() if key.startswith("model.")]
    for key in section:
        if key not in known:
            hint = did_you_mean(key, known) or f"; inspect reads {', '.join(KEYS)}"
            raise UserError(f"--config {path}: unknown key model.{key}{hint}")
    return section


def main(argv: list[str]) -> int:
    """Print the tables of a model under a policy, and write the record if `--out` is given.

    Args:
        argv: arguments after the verb.

    Returns:
        Exit status 0.

    Raises:
        UserError: wrong arguments, an unknown model, an invalid policy, or a file that can't be
            written.
    """
    values, out, energy = _parse(argv)
    command = f"{program_name()} inspect {shlex.join(argv)}"
    record = inspect_record(values, command, energy, SimulationProgress() if energy else None)
    show(record)
    if out is not None:
        write_record(out, record)
        print(f"- wrote {out}")
    return 0
