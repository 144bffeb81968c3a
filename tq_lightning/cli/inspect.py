"""`python -m tq_lightning inspect`: the byte table of any model under any policy, without training or weights."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tq_lightning.cli.parser import Parser
from tq_lightning.cost.record import inspect_record
from tq_lightning.errors import UserError
from tq_lightning.records import STORAGE_LABELS, InspectRecord, write_record

# model.* key -> (default, what it is); the same keys as in a training configuration
KEYS: dict[str, tuple[Any, str]] = {
    "name": (None, "a timm model, or one of our CIFAR ResNets"),
    "num_classes": (None, "classes; null = the model's own number"),
    "model_args": ({}, "further arguments of the model, as {in_chans: 1}"),
    "skip": (["first", "last"], "layers left in float: first, last, name patterns; [] = none"),
    "widths": ([8, 4, 2, 1], "trained widths"),
    "max_bits": (8, "stored width"),
    "norm": ("per_width", "per_width, per_width_all or shared"),
    "normalizer": ("tanh", "tanh, absmax; with _channel one scale for each output channel"),
    "activations": (None, "activation quantizer; a learned clip is stored too"),
}


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], Path | None]:
    parser = Parser("inspect", description=__doc__)
    parser.add_argument(
        "--config", help="YAML file whose model: block gives the keys not given here"
    )
    for key, (default, words) in KEYS.items():
        parser.add_argument(
            f"--model.{key}", dest=key, metavar="V", help=f"{words} (default {default})"
        )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write the inspect record that `report` reads"
    )
    given = vars(parser.parse_args(list(argv)))
    out, config = given.pop("out"), given.pop("config")
    values = {key: default for key, (default, _) in KEYS.items()}
    values |= {key: value for key, value in _model_block(config).items() if key in KEYS}
    values |= {key: _value(key, text) for key, text in given.items() if text is not None}
    for key in ("skip", "widths"):
        listed = values[key]
        listed = (
            [part.strip() for part in listed.split(",") if part.strip()]
            if isinstance(listed, str)
            else listed
        )
        values[key] = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    try:
        values["widths"] = [int(bits) for bits in values["widths"]]
    except (TypeError, ValueError):
        raise UserError(
            f"model.widths: got {values['widths']!r}, pass whole numbers such as 8,4,2,1"
        ) from None
    if not isinstance(values["model_args"] or {}, dict):
        raise UserError(
            f"model.model_args: got {values['model_args']!r}, pass a mapping such as '{{in_chans: 1}}'"
        )
    if not isinstance(values["name"], str):
        raise UserError("inspect: no model; pass --model.name NAME")
    if out is not None and (out.suffix != ".json" or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out}: pass a file that ends in .json, in a folder that exists")
    return values, out


def _value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"model.{key}: cannot read {text!r}; pass a YAML value") from None
    return None if value == "None" else value


def _model_block(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read ({type(error).__name__})") from None
    block = content.get("model") if isinstance(content, dict) else None
    if not isinstance(block, dict):
        raise UserError(f"--config {path}: has no model: block")
    return block


def _show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right_from: int
) -> None:
    """A rich table in a terminal, plain aligned columns elsewhere; columns from `right_from` on are numbers."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="right" if i >= right_from else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    wide = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in (columns, *rows):
        cells = (
            c.rjust(w) if i >= right_from else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, wide, strict=True))
        )
        print("  ".join(cells).rstrip())
    print()


def show(record: InspectRecord) -> None:
    """Print the tables of a record: bytes by layer, in total, and read by width; then the energy model and its sources."""
    layers = [
        [
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            "float" if layer.bits is None else str(layer.bits),
            f"{layer.parameters:,}",
            *(f"{layer.bytes[way]:,}" for way in record.ways),
        ]
        for layer in record.layers
    ]
    columns = ["layer", "kind", "shape", "bits", "parameters", *record.ways]
    _show(f"{record.model}: bytes by layer", columns, layers, 3)
    floats = 4 * record.parameters
    totals = [
        [
            way,
            STORAGE_LABELS[way],
            *(f"{part:,}" for part in (s.weights, s.scales, s.float, s.norms, s.total)),
            f"{floats / s.total:.3f}x",
        ]
        for way, s in record.ways.items()
    ]
    columns = ["way", "what", "weights", "scales", "float", "norms", "total"]
    _show(
        "in total, to serve all widths",
        [*columns, "float parameters over it"],
        totals,
        right_from=2,
    )
    reads = [
        [str(bits), f"{size:,}", f"{floats / size:.2f}x"] for bits, size in record.read_at.items()
    ]
    _show(
        "read from the packed file to run at a width",
        ["bits", "bytes", "float parameters over it"],
        reads,
        0,
    )
    energy = record.energy
    assert energy is not None
    names = [name.removesuffix("_pj").replace("_", " ") for name in energy.by_width[1]]
    joules = [
        [str(bits), *(f"{pj * 1e-6:,.2f}" for pj in row.values())]
        for bits, row in energy.by_width.items()
    ]
    title = "energy in microjoule, a model and no measurement: a switch to the width, and an inference's weight traffic"
    _show(title, ["bits", *names], joules, 0)
    for line in (*record.accounting, *(f"energy: {line}" for line in energy.assumptions)):
        print(f"- {line}")
    constants = "; ".join(f"{name} {pj:g}" for name, pj in energy.constants_pj.items())
    print(f"- energy, pJ: {constants}")
    print(f"- energy, source: {energy.source}")


def main(argv: list[str]) -> int:
    """Prints the tables of a model under a policy, and writes the record where `--out` is given. Returns 0.

    Raises:
        UserError: bad arguments, an unknown model, a policy that cannot be, a file that cannot be written.
    """
    values, out = _parse(argv)
    record = inspect_record(values, f"python -m tq_lightning inspect {shlex.join(argv)}")
    show(record)
    if out is not None:
        write_record(out, record)
        print(f"- wrote {out}")
    return 0
