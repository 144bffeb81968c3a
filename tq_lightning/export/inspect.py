"""`python -m tq_lightning inspect`: the byte table of any model under any policy, without training or weights."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tq_lightning import __version__
from tq_lightning.errors import UserError

SCHEMA = 1
MECHANISM_BITS = (1, 2, 3, 4)
GRID = 1024  # values of u between 0 and 1; cell centres, so that none lies on the edge of a bin
WAY_WORDS = {
    "float_master": "float master, one norm set",
    "file_per_width": "one file for each width",
    "master8": "stored codes, one norm set",
    "packed": "packed file, all norm sets",
    "paper": "the paper's accounting",
}
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"inspect: {message}; --help lists the arguments")


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], Path | None]:
    parser = _Parser("python -m tq_lightning inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file whose model: block gives the keys not given here")
    for key, (default, words) in KEYS.items():
        parser.add_argument(f"--model.{key}", dest=key, metavar="V", help=f"{words} (default {default})")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the inspect record that `report` reads")
    given = vars(parser.parse_args(list(argv)))
    out, config = given.pop("out"), given.pop("config")
    values = {key: default for key, (default, _) in KEYS.items()}
    values |= {key: value for key, value in _model_block(config).items() if key in KEYS}
    values |= {key: _value(key, text) for key, text in given.items() if text is not None}
    for key in ("skip", "widths"):
        listed = values[key]
        listed = [part.strip() for part in listed.split(",") if part.strip()] if isinstance(listed, str) else listed
        values[key] = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    try:
        values["widths"] = [int(bits) for bits in values["widths"]]
    except (TypeError, ValueError):
        raise UserError(f"model.widths: got {values['widths']!r}, pass whole numbers such as 8,4,2,1") from None
    if not isinstance(values["model_args"] or {}, dict):
        raise UserError(f"model.model_args: got {values['model_args']!r}, pass a mapping such as '{{in_chans: 1}}'")
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


def inspect_record(values: dict[str, Any], command: str = "") -> dict[str, Any]:
    """The inspect record (schema 1) of a model under a policy.

    Args:
        values: the keys of `KEYS`, all of them.
        command: the command line, for the record.

    Raises:
        UserError: no such model, or a policy that prepare() refuses.
    """
    from tq_lightning.export.energy import energy_model
    from tq_lightning.export.storage import WAYS, float_over, layer_rows, meta_model, paper_rows, read_at, total
    from tq_lightning.quant.prepare import prepare

    policy = {key: values[key] for key in ("skip", "widths", "max_bits", "norm", "normalizer", "activations")}
    make = (values["name"], values["num_classes"])
    model = meta_model(*make, **(values["model_args"] or {}))
    try:
        prepare(model, verbose=False, **policy)
        rows = {way: layer_rows(model) for way in WAYS}
        rows["paper"] = paper_rows(meta_model(*make, **(values["model_args"] or {})))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"inspect {values['name']}: {error}") from error
    max_bits, own = policy["max_bits"], rows["packed"]
    ways = {way: total(rows[way], way, max_bits) for way in WAYS}
    by_layer = {way: {row.name: sum(WAYS[way](row, max_bits)) for row in rows[way]} for way in WAYS}
    record = {
        "schema": SCHEMA,
        "kind": "inspect",
        "id": uuid.uuid4().hex,
        "model": values["name"],
        "model_args": {"num_classes": values["num_classes"], **(values["model_args"] or {})},
        "policy": policy,
        "versions": {"tq_lightning": __version__, "python": platform.python_version(), **_versions("torch", "timm")},
        "commit": _commit(),
        "command": command,
        "parameters": sum(row.parameters for row in own),
        "quantized_parameters": sum(row.codes for row in own),
        "layers": [
            {
                "name": row.name,
                "kind": row.kind,
                "shape": list(row.shape),
                "parameters": row.parameters,
                "bits": row.bits,
                "bytes": {way: by_layer[way].get(row.name, 0) for way in WAYS},
            }
            for row in own
        ],
        "ways": ways,
        "read_at": {str(bits): read_at(own, bits) for bits in range(1, max_bits + 1)},
        "paper_ratio": float_over(rows["paper"], ways["paper"]["total"]),
        "policy_ratio": float_over(own, ways["packed"]["total"]),
        "energy": energy_model(sum(row.codes for row in own), max_bits),
        "mechanism": mechanism(),
    }
    return {**record, "accounting": _accounting(record)}


def _accounting(record: dict[str, Any]) -> list[str]:
    """What the two ratios, and the others, are made of; sizes in bytes."""
    ways, policy = record["ways"], record["policy"]
    paper, packed, one, codes, files = (ways[way] for way in ("paper", "packed", "float_master", "master8", "file_per_width"))
    floats = f"{4 * record['parameters']:,} bytes"
    return [
        f"the paper's accounting: {record['parameters']:,} float parameters, {floats}, over {paper['total']:,} = "
        f"{paper['weights']:,} of 8-bit weights (every layer but the stem, the classifier too) + {paper['float']:,} of stem, "
        f"biases and the rest in float + {paper['norms']:,} of norms (a batch norm has 8 sets of scale, shift, mean and "
        f"variance); no scales, no header: {record['paper_ratio']:.3f}x",
        f"this policy as packed (in float: {', '.join(policy['skip']) or 'nothing'}; norm {policy['norm']}; widths 1 to "
        f"{policy['max_bits']}): the same {floats} over {packed['total']:,} = {packed['weights']:,} of weights + "
        f"{packed['scales']:,} of scales + {packed['float']:,} in float + {packed['norms']:,} of norms, the file but for its "
        f"header: {record['policy_ratio']:.3f}x",
        f"with one norm set on either side, statistics counted: {one['total']:,} in float over {codes['total']:,} with codes: "
        f"{one['total'] / codes['total']:.3f}x; a float master that serves several widths needs the other sets as well",
        f"one file for each width: {files['total']:,} bytes, {files['total'] / packed['total']:.3f} times the packed file",
    ]


def mechanism() -> dict[str, Any]:
    """Staircases on a plain tensor: levels of round, of round at 8 bits shifted, and of floor, at 1 to 4 bits."""
    import torch

    from tq_lightning.quant.codes import STORED_BITS, codes_to_levels, floor_codes, round_codes, truncate_codes

    u = (torch.arange(GRID) + 0.5) / GRID
    stored = round_codes(u, STORED_BITS)
    makers = {
        "round": lambda bits: round_codes(u, bits),
        "round_shifted": lambda bits: truncate_codes(stored, STORED_BITS, bits),
        "floor": lambda bits: floor_codes(u, bits),
    }
    lines = {
        name: {str(bits): [round(x, 6) for x in codes_to_levels(make(bits), bits).tolist()] for bits in MECHANISM_BITS}
        for name, make in makers.items()
    }
    return {"bits": list(MECHANISM_BITS), "u": u.tolist(), **lines}


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def _commit() -> str | None:
    try:
        home = Path(__file__).resolve().parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right_from: int) -> None:
    """A rich table in a terminal, plain aligned columns elsewhere; columns from `right_from` on are numbers."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i >= right_from else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    wide = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in (columns, *rows):
        cells = (c.rjust(w) if i >= right_from else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True)))
        print("  ".join(cells).rstrip())
    print()


def show(record: dict[str, Any]) -> None:
    """Prints the tables of a record: bytes per layer, in total by way, and read by width; then the words."""
    ways = list(record["ways"])
    layers = [
        [
            layer["name"],
            layer["kind"],
            "x".join(map(str, layer["shape"])),
            "float" if layer["bits"] is None else str(layer["bits"]),
            f"{layer['parameters']:,}",
            *(f"{layer['bytes'][way]:,}" for way in ways),
        ]
        for layer in record["layers"]
    ]
    _show(f"{record['model']}: bytes by layer", ["layer", "kind", "shape", "bits", "parameters", *ways], layers, 3)
    floats = 4 * record["parameters"]
    parts = ("weights", "scales", "float", "norms", "total")
    totals = [
        [way, WAY_WORDS[way], *(f"{size[part]:,}" for part in parts), f"{floats / size['total']:.3f}x"]
        for way, size in record["ways"].items()
    ]
    _show("in total, to serve all widths", ["way", "what", *parts, "float parameters over it"], totals, 2)
    reads = [[bits, f"{size:,}", f"{floats / size:.2f}x"] for bits, size in record["read_at"].items()]
    _show("read from the packed file to run at a width", ["bits", "bytes", "float parameters over it"], reads, 0)
    energy = record["energy"]
    names = list(energy["by_width"]["1"])
    joules = [[bits, *(f"{pj * 1e-6:,.2f}" for pj in row.values())] for bits, row in energy["by_width"].items()]
    title = "energy in microjoule, a model and no measurement: a switch to the width, and an inference's weight traffic"
    _show(title, ["bits", *(name.removesuffix("_pj").replace("_", " ") for name in names)], joules, 0)
    for line in (*record["accounting"], *(f"energy: {line}" for line in energy["assumptions"])):
        print(f"- {line}")
    print("- energy, pJ: " + "; ".join(f"{name} {pj:g}" for name, pj in energy["constants_pj"].items()))
    print(f"- energy, source: {energy['source']}")


def main(argv: list[str]) -> int:
    """Prints the tables of a model under a policy, and writes the record where `--out` is given. Returns 0.

    Raises:
        UserError: bad arguments, an unknown model, a policy that cannot be, a file that cannot be written.
    """
    values, out = _parse(argv)
    record = inspect_record(values, f"python -m tq_lightning inspect {shlex.join(argv)}")
    show(record)
    if out is not None:
        _write(record, out)
        print(f"- wrote {out}")
    return 0


def _write(record: dict[str, Any], out: Path) -> None:
    """Whole or not at all."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(record))
        os.replace(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
