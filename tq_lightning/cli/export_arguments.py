"""Arguments of the verb `export`, and checks of their combinations."""

import argparse
from pathlib import Path

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError

FORMATS = ("packed", "onnx", "onnx-dynamic", "qonnx", "executorch")
ONE_WIDTH = ("onnx", "qonnx", "executorch")


def parser() -> Parser:
    """Build the parser of the verb."""
    p = Parser(
        "export",
        description="Convert a checkpoint or a packed file to a packed file, an ONNX graph or an "
        "ExecuTorch program.",
    )
    p.add_argument(
        "source", metavar="CKPT", type=Path, help="training checkpoint (.ckpt), or packed file"
    )
    p.add_argument("--out", type=Path, required=True, help="file to write")
    p.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the output (default: packed); onnx, qonnx and executorch store one width",
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
        help="observe activation ranges for integer inference on DATA and store them: a folder of "
        "images, a data set such as digits, or `run`, the training data of the checkpoint",
    )
    p.add_argument(
        "--observer",
        choices=("percentile", "mse"),
        help="with --calibrate: ignore outliers (default), or minimize the squared error",
    )
    p.add_argument(
        "--runtime",
        choices=("onnxruntime", "openvino"),
        help="with --format onnx: runtime to write the graph for (default: onnxruntime)",
    )
    p.add_argument(
        "--residual",
        choices=("int8", "float"),
        help="with --integer: type of the inputs of residual adds (default: int8 for ONNX Runtime, "
        "float for OpenVINO and for networks trained with activation codes)",
    )
    p.add_argument(
        "--activation-codes",
        type=int,
        choices=(127, 255),
        help="with --integer: largest activation code (default: 127 if sums with 255 could "
        "saturate on x86 processors without VNNI, else 255)",
    )
    p.add_argument(
        "--exact",
        action="store_const",
        const=True,
        help="with --integer: exact 8-bit weights, in two products (default: for networks trained "
        "with activation codes; others use the nearest int8)",
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
        help="with --max-bits: also write the remaining planes to this file, for --add",
    )
    p.add_argument(
        "--add", type=Path, help="file written by --rest: add its planes to the packed file CKPT"
    )
    p.add_argument(
        "--model.name",
        dest="factory",
        metavar="PACKAGE.MODULE:FACTORY",
        help="factory that CKPT names; required to import it",
    )
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments after the verb, and fill in the format and the opset.

    Raises:
        UserError: an invalid argument or combination of arguments.
    """
    a = parser().parse_args(argv)
    if a.format is None and a.out.suffix.lower() == ".pte":
        a.format = "executorch"
    if a.format is None and a.out.suffix.lower() == ".onnx":
        raise UserError(
            f"--out {a.out} looks like an ONNX file; pass --format onnx, onnx-dynamic or qonnx, "
            "or a name that ends in .safetensors for a packed file"
        )
    a.format = a.format or "packed"
    if not a.source.is_file():
        raise UserError(
            f"no file {a.source} to export; pass a training checkpoint or a packed file"
        )
    if a.observer is not None and a.calibrate is None:
        raise UserError("--observer needs --calibrate DATA; pass both")
    if a.calibrate is not None and (a.rest is not None or a.add is not None):
        raise UserError(
            "--calibrate cannot be combined with --rest or --add; run export once for each"
        )
    if a.rest is not None and a.max_bits is None:
        raise UserError("--rest stores the planes that --max-bits omits; pass both")
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
    if a.calibrate is not None and a.format not in ("packed", "executorch") and not a.integer:
        raise UserError(
            "--calibrate is for packed files, ExecuTorch programs and --integer, got "
            f"--format {a.format}, which has no activation ranges"
        )
    for name in ("residual", "activation_codes", "exact"):
        if getattr(a, name) is not None and not a.integer:
            raise UserError(f"--{name.replace('_', '-')} needs --integer; pass both")
    if a.runtime is not None and a.format != "onnx":
        raise UserError(f"--runtime is for --format onnx, got {a.format}")
    if a.runtime == "openvino" and a.opset is None:
        a.opset = 21  # OpenVINO has no 2-bit integers
    if a.runtime == "openvino" and a.opset == 25:
        raise UserError("OpenVINO does not support opset 25; pass --opset 21, or omit it")
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
    return a


def _resolved(path: Path | None) -> list[Path]:
    return [] if path is None else [path.resolve()]
