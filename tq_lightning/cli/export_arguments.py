"""Arguments of the verb `export`, and checks of their combinations."""

import argparse
from pathlib import Path

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError
from tq_lightning.files import check_parent, expand_path

FORMATS = ("packed", "onnx", "onnx-dynamic", "qonnx", "executorch")
ONE_WIDTH = ("onnx", "qonnx", "executorch")
# retyped, because --help must not import torch; a test compares them
OBSERVERS = ("percentile", "mse")
RUNTIMES = ("onnxruntime", "openvino")
RESIDUALS = ("int8", "float")


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
        choices=OBSERVERS,
        help="with --calibrate: ignore outliers (default), or minimize the squared error",
    )
    p.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help="with --format onnx: runtime to write the graph for (default: onnxruntime)",
    )
    p.add_argument(
        "--residual",
        choices=RESIDUALS,
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
    args = parser().parse_args(argv)
    if args.format is None and args.out.suffix.lower() == ".pte":
        args.format = "executorch"
    if args.format is None and args.out.suffix.lower() == ".onnx":
        raise UserError(
            f"--out {args.out} looks like an ONNX file; pass --format onnx, onnx-dynamic or "
            "qonnx, or a name that ends in .safetensors for a packed file"
        )
    args.format = args.format or "packed"
    if not args.source.is_file():
        raise UserError(
            f"no file {args.source} to export; pass a training checkpoint or a packed file"
        )
    if args.observer is not None and args.calibrate is None:
        raise UserError("--observer needs --calibrate DATA; pass both")
    if args.calibrate == "":
        raise UserError(
            "--calibrate got an empty value; pass a folder of images, a data set or run"
        )
    if args.calibrate is not None:
        args.calibrate = str(expand_path(args.calibrate))
    if args.calibrate is not None and (args.rest is not None or args.add is not None):
        raise UserError(
            "--calibrate cannot be combined with --rest or --add; run export once for each"
        )
    if args.rest is not None and args.max_bits is None:
        raise UserError("--rest stores the planes that --max-bits omits; pass both")
    if args.format not in ONE_WIDTH and args.bits is not None:
        raise UserError(
            f"--bits is the width of {', '.join(ONE_WIDTH)} files; for fewer planes pass "
            f"--max-bits {args.bits}"
        )
    if args.opset is not None and args.format != "onnx":
        raise UserError(f"--opset is for --format onnx, got {args.format}")
    if args.integer and args.format != "onnx":
        raise UserError(f"--integer is for --format onnx, got {args.format}")
    if args.integer and args.opset not in (None, 21):
        raise UserError(f"--integer writes opset 21, got --opset {args.opset}")
    if args.lean and (args.format != "onnx" or args.integer):
        raise UserError("--lean is for --format onnx without --integer")
    if (
        args.calibrate is not None
        and args.format not in ("packed", "executorch")
        and not args.integer
    ):
        raise UserError(
            "--calibrate is for packed files, ExecuTorch programs and --integer, got "
            f"--format {args.format}, which has no activation ranges"
        )
    for name in ("residual", "activation_codes", "exact"):
        if getattr(args, name) is not None and not args.integer:
            raise UserError(f"--{name.replace('_', '-')} needs --integer; pass both")
    if args.runtime is not None and args.format != "onnx":
        raise UserError(f"--runtime is for --format onnx, got {args.format}")
    if args.runtime == "openvino" and args.opset is None:
        args.opset = 21  # OpenVINO has no 2-bit integers
    if args.runtime == "openvino" and args.opset == 25:
        raise UserError("OpenVINO does not support opset 25; pass --opset 21, or omit it")
    if args.rest is not None and args.rest.resolve() == args.out.resolve():
        raise UserError("--rest and --out are the same file; pass two")
    for flag, target in (("--out", args.out), ("--rest", args.rest)):
        if target is not None and target.resolve() in {args.source.resolve(), *_resolved(args.add)}:
            raise UserError(f"{flag} {target} would replace a file that is read; pass another name")
    if args.format != "packed" and (
        args.compress or args.rest or args.add or args.max_bits is not None
    ):
        raise UserError(
            "--compress, --rest, --add and --max-bits are for packed files, got "
            f"--format {args.format}"
        )
    for flag, target in (("--out", args.out), ("--rest", args.rest)):
        if target is not None:
            if target.is_dir():
                raise UserError(f"{flag} {target} is a folder; pass the name of a file")
            check_parent(target)
    return args


def _resolved(path: Path | None) -> list[Path]:
    return [] if path is None else [path.resolve()]
