"""The verb `export`: convert a checkpoint or a packed file to a file for a runtime."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tq_lightning.cli.calibrate_packed import calibrate_packed
from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory

FORMATS = ("packed", "onnx", "onnx-dynamic", "qonnx", "executorch")
ONE_WIDTH = ("onnx", "qonnx", "executorch")


def parser() -> Parser:
    """Build the parser of the verb."""
    p = Parser(
        "export", description="Convert a checkpoint or a packed file to a packed file or ONNX."
    )
    p.add_argument(
        "source", metavar="CKPT", type=Path, help="training checkpoint (.ckpt), or packed file"
    )
    p.add_argument("--out", type=Path, required=True, help="file to write")
    p.add_argument(
        "--format",
        choices=FORMATS,
        help="default: packed; onnx, qonnx and executorch hold one width",
    )
    p.add_argument(
        "--bits",
        type=int,
        help="width of an onnx, qonnx or executorch file (default: the widest of the packed file)",
    )
    p.add_argument(
        "--opset",
        type=int,
        help="ONNX opset, 21 or 25 (default: the lowest with the smallest integer type)",
    )
    p.add_argument(
        "--lean",
        action="store_true",
        help="with --format onnx: ONNX Runtime keeps the codes in memory and computes the weights "
        "at each run, not once at load",
    )
    p.add_argument(
        "--integer",
        action="store_true",
        help="with --format onnx: uint8 activations and int8 weights, computed in integers",
    )
    p.add_argument(
        "--calibrate",
        metavar="DATA",
        help="store activation ranges, for integer inference, observed on DATA: a folder of "
        "images, a data set such as digits, or `run`, the data of the checkpoint's run",
    )
    p.add_argument(
        "--observer",
        choices=("percentile", "mse"),
        help="with --calibrate: leave outliers out (default), or least squared error",
    )
    p.add_argument(
        "--runtime",
        choices=("onnxruntime", "openvino"),
        help="with --format onnx: runtime to write the graph for (default: onnxruntime)",
    )
    p.add_argument(
        "--residual",
        choices=("int8", "float"),
        help="with --integer: what a residual add reads (default: int8 for ONNX Runtime, float for "
        "OpenVINO and for networks trained with activation codes)",
    )
    p.add_argument(
        "--activation-codes",
        type=int,
        choices=(127, 255),
        help="with --integer: largest activation code (default: 127 where x86 processors without "
        "VNNI could saturate with 255, else 255)",
    )
    p.add_argument("--max-bits", type=int, help="write only the first planes")
    p.add_argument(
        "--fold-norms",
        action="store_true",
        help="store batch norms as scale and shift; logits change by about 1e-5",
    )
    p.add_argument(
        "--compress", action="store_true", help="compress each plane with zstd (lossless)"
    )
    p.add_argument(
        "--rest",
        type=Path,
        help="with --max-bits: also write the other planes, to add them later",
    )
    p.add_argument(
        "--add", type=Path, help="file written by --rest: add its planes to the packed file CKPT"
    )
    p.add_argument(
        "--model.name",
        dest="factory",
        metavar="PACKAGE.MODULE:FACTORY",
        help="factory that CKPT names; it is imported only if you pass it",
    )
    return p


def main(argv: list[str]) -> int:
    """Convert a file.

    Args:
        argv: arguments after the verb.

    Returns:
        Exit status 0.

    Raises:
        UserError: wrong arguments, a file that can't be read or written, or a width that the file
            does not have.
    """
    a = parser().parse_args(argv)
    if a.format is None and a.out.suffix == ".pte":
        a.format = "executorch"
    if a.format is None and a.out.suffix == ".onnx":
        raise UserError(
            f"--out {a.out} looks like an ONNX file; pass --format onnx, onnx-dynamic or qonnx, "
            "or another name for a packed file"
        )
    a.format = a.format or "packed"
    if not a.source.is_file():
        raise UserError(
            f"no file {a.source} to export; pass a training checkpoint or a packed file"
        )
    if a.observer is not None and a.calibrate is None:
        raise UserError("--observer is for --calibrate DATA; pass both")
    if a.calibrate is not None and (a.rest is not None or a.add is not None):
        raise UserError("--calibrate changes the file; pass it before or after --rest and --add")
    if a.rest is not None and a.max_bits is None:
        raise UserError("--rest holds the planes that --max-bits leaves out; pass both")
    if a.format not in ONE_WIDTH and a.bits is not None:
        raise UserError(
            f"--bits is the width of {', '.join(ONE_WIDTH)} files; for fewer planes pass "
            f"--max-bits {a.bits}"
        )
    if a.opset is not None and a.format != "onnx":
        raise UserError(f"--opset is for --format onnx, got {a.format}")
    if a.integer and a.format != "onnx":
        raise UserError(f"--integer is for --format onnx, got {a.format}")
    if a.integer and a.opset not in (None, 21):
        raise UserError(f"--integer writes opset 21, got --opset {a.opset}")
    if a.lean and (a.format != "onnx" or a.integer):
        raise UserError("--lean is for --format onnx without --integer")
    if a.calibrate is not None and "onnx" in a.format and not a.integer:
        raise UserError(
            "--calibrate is for packed files and --integer; these graphs have no ranges"
        )
    for name in ("residual", "activation_codes"):
        if getattr(a, name) is not None and not a.integer:
            raise UserError(f"--{name.replace('_', '-')} is for --integer; pass both")
    if a.runtime is not None and a.format != "onnx":
        raise UserError(f"--runtime is for --format onnx, got {a.format}")
    if a.runtime == "openvino" and a.opset is None:
        a.opset = 21  # it has no 2-bit integers
    if a.runtime == "openvino" and a.opset == 25:
        raise UserError("OpenVINO does not read opset 25; pass --opset 21, or leave it out")
    if a.rest is not None and a.rest.resolve() == a.out.resolve():
        raise UserError("--rest and --out are the same file; pass two")
    for flag, target in (("--out", a.out), ("--rest", a.rest)):
        if target is not None and target.resolve() in {a.source.resolve(), *_resolved(a.add)}:
            raise UserError(f"{flag} {target} would replace a file that is read; pass another name")
    if a.format != "packed" and (a.compress or a.rest or a.add or a.max_bits is not None):
        raise UserError(
            "--compress, --rest, --add and --max-bits are for packed files, got "
            f"--format {a.format}"
        )
    if a.format == "packed":
        sizes = _packed(a) if a.calibrate is None else _calibrated(a)
        print("\n".join(f"{name:<10}{size:>14,} bytes" for name, size in sizes.items()))
        print(f"wrote {a.out}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = a.source
        if not is_packed(path):
            path = Path(folder) / "model.safetensors"
            save_checkpoint(a.source, path, a.factory, fold_norms=a.fold_norms)
        if a.calibrate is not None:
            before, path = path, Path(folder) / "calibrated.safetensors"
            calibrate_packed(before, path, a.source, a.calibrate, a.observer or "percentile")
        hint = ""
        if a.format in ONE_WIDTH and a.bits is None:
            a.bits = _widest(path)
            hint = f": {a.bits} bits, pass --bits for another width"
        if a.format == "executorch":
            _executorch(a, path)
        else:
            _onnx(a, path)
    print(f"wrote {a.out} ({a.out.stat().st_size:,} bytes){hint}")
    return 0


def _resolved(path: Path | None) -> list[Path]:
    return [] if path is None else [path.resolve()]


def is_packed(path: Path) -> bool:
    """Return True if a file looks like safetensors: a header length, then a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and head[4:8] == b"\0" * 4)


def save_checkpoint(
    checkpoint: Path, out: Path, factory: str | None = None, **options: Any
) -> dict[str, int]:
    """Pack a training checkpoint with its preprocessing and class names; see `save_packed`."""
    from tq_lightning.export.packed.writer import save_packed
    from tq_lightning.training.checkpoint import load_checkpoint_model

    model, hparams, seen = load_checkpoint_model(checkpoint, factory)
    preprocessing = {key: value for key, value in seen.items() if key != "classes"} or None
    classes = seen.get("classes")
    if classes is not None and len(classes) != hparams["num_classes"]:
        classes = None
    args = dict(hparams["model_args"] or {})
    if is_factory(hparams["name"]) and hparams["num_classes"] is not None:
        args.setdefault("num_classes", hparams["num_classes"])  # the network may not tell it
    return save_packed(
        model,
        out,
        name=hparams["name"],
        model_args=args,
        preprocessing=preprocessing,
        class_names=classes,
        **options,
    )


def _calibrated(a: argparse.Namespace) -> dict[str, int]:
    """Write a packed file with activation ranges; nothing is written if they can't be observed."""
    with tempfile.TemporaryDirectory() as folder:
        out, a.out = a.out, Path(folder) / "packed.safetensors"
        _packed(a)
        path, a.out = a.out, out
        return calibrate_packed(path, out, a.source, a.calibrate, a.observer or "percentile")


def _packed(a: argparse.Namespace) -> dict[str, int]:
    from tq_lightning.export.packed import edit as repack

    if a.add is not None:
        if a.max_bits is not None or a.fold_norms or a.compress or not is_packed(a.source):
            raise UserError(
                "--add joins two packed files as they are; "
                "pass it with a packed file and --out alone"
            )
        return repack.join(a.source, a.add, a.out)
    if not is_packed(a.source):
        options = {"max_bits": a.max_bits, "fold_norms": a.fold_norms, "compress": a.compress}
        if a.rest is None:
            return save_checkpoint(a.source, a.out, a.factory, **options)
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.safetensors"
            save_checkpoint(a.source, whole, a.factory, fold_norms=a.fold_norms)
            repack.write_rest(whole, a.rest, a.max_bits)
            return repack.repack(whole, a.out, a.max_bits, a.compress)
    if a.fold_norms:
        raise UserError("--fold-norms needs the checkpoint, not a packed file; pass the .ckpt file")
    if a.rest is not None:
        repack.write_rest(a.source, a.rest, a.max_bits)
    return repack.repack(a.source, a.out, a.max_bits, a.compress)


def _widest(path: Path) -> int:
    """Return the widest width that a packed file runs at."""
    from tq_lightning.export.packed.container import Container
    from tq_lightning.export.packed.header import read_header

    with Container(path) as file:
        header = read_header(file)
    return max(header["norm_widths"], default=header["stored_bits"])


def _onnx(a: argparse.Namespace, path: Path) -> None:
    try:
        from tq_lightning.export.onnx import dynamic, integer, qonnx, static
    except ImportError as error:
        raise UserError(
            f"--format {a.format} needs the onnx package ({error}); "
            "pip install 'tq_lightning[onnx]'"
        ) from error
    if a.integer:
        options = {"residual": a.residual, "top": a.activation_codes}
        runtime = a.runtime or "onnxruntime"
        print("\n".join(integer.export_integer(path, a.out, a.bits, runtime, **options).lines()))
    elif a.format == "onnx":
        static.export_static(path, a.out, a.bits, a.opset, a.lean)
    elif a.format == "onnx-dynamic":
        dynamic.export_dynamic(path, a.out)
    else:
        qonnx.export_qonnx(path, a.out, a.bits)


def _executorch(a: argparse.Namespace, path: Path) -> None:
    from tq_lightning.export.executorch import export_executorch

    program = export_executorch(path, a.out, a.bits)
    print(f"{len(program.integer)} layers run as integers")
    for name, reason in program.left_in_float.items():
        print(f"left in float: {name}: {reason}")
