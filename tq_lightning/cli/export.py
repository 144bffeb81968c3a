"""The verb `export`: convert a checkpoint or a packed file to a file for a runtime."""

import argparse
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tq_lightning.cli.calibration import calibrate
from tq_lightning.cli.export_arguments import ONE_WIDTH, parse
from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory
from tq_lightning.files import atomic_write


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
    args = parse(argv)
    if args.format == "packed":
        sizes = _packed(args) if args.calibrate is None else _calibrated(args)
        print("\n".join(f"{name:<10}{size:>14,} bytes" for name, size in sizes.items()))
        print(f"wrote {args.out}")
        return 0
    if args.fold_norms:
        _check_checkpoint(args.source)
    with packed_file(args.source, args.factory, fold_norms=args.fold_norms) as (path, folder):
        if args.calibrate is not None:
            before, path = path, folder / "calibrated.safetensors"
            calibrate(
                before,
                path,
                args.source,
                args.calibrate,
                args.observer or "percentile",
                args.factory,
            )
        hint = ""
        if args.format in ONE_WIDTH and args.bits is None:
            args.bits = _widest(path)
            hint = f": {args.bits} bits, pass --bits for another width"
        if args.format == "executorch":
            _executorch(args, path)
        else:
            _onnx(args, path)
    print(f"wrote {args.out} ({args.out.stat().st_size:,} bytes){hint}")
    return 0


def is_packed(path: Path) -> bool:
    """Return True if a file looks like safetensors: a header length followed by a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and head[4:8] == b"\0" * 4)


@contextmanager
def packed_file(
    source: Path, factory: str | None = None, **options: Any
) -> Iterator[tuple[Path, Path]]:
    """Yield a packed file for `source`: itself, or a checkpoint packed into a temporary folder.

    Args:
        source: packed file or training checkpoint.
        factory: see `save_checkpoint`.
        options: see `save_checkpoint`.

    Yields:
        (packed file, temporary folder).

    Raises:
        UserError: raised by the body; see `_temporary_folder`.
    """
    with _temporary_folder(source) as folder:
        path = source
        if not is_packed(path):
            path = folder / "model.safetensors"
            save_checkpoint(source, path, factory, **options)
        yield path, folder


@contextmanager
def _temporary_folder(source: Path) -> Iterator[Path]:
    """Yield a temporary folder. A UserError of the body names `source` instead of its files."""
    with tempfile.TemporaryDirectory() as name:
        try:
            yield Path(name)
        except UserError as error:
            if name not in str(error):
                raise
            text = re.sub(rf"{re.escape(name)}/[\w.]+", lambda _: str(source), str(error))
            raise UserError(text) from error


def save_checkpoint(
    checkpoint: Path, out: Path, factory: str | None = None, **options: Any
) -> dict[str, int]:
    """Pack a training checkpoint with its preprocessing and class names; see `save_packed`."""
    from tq_lightning.export.packed.writer import save_packed
    from tq_lightning.training.checkpoint import load_checkpoint_model

    model, hparams, seen = load_checkpoint_model(checkpoint, factory)
    rest = ("classes", "inputs")
    preprocessing = {key: value for key, value in seen.items() if key not in rest} or None
    classes = seen.get("classes")
    if classes is not None and len(classes) != hparams["num_classes"]:
        classes = None
    args = dict(hparams["model_args"] or {})
    if is_factory(hparams["name"]) and hparams["num_classes"] is not None:
        args.setdefault("num_classes", hparams["num_classes"])  # may not be an attribute
    return save_packed(
        model,
        out,
        name=hparams["name"],
        model_args=args,
        preprocessing=preprocessing,
        class_names=classes,
        inputs=seen.get("inputs"),
        **options,
    )


def _calibrated(args: argparse.Namespace) -> dict[str, int]:
    """Write a packed file with activation ranges; nothing is written if they can't be observed."""
    with _temporary_folder(args.source) as folder:
        out, args.out = args.out, folder / "packed.safetensors"
        _packed(args)
        path, args.out = args.out, out
        return calibrate(
            path, out, args.source, args.calibrate, args.observer or "percentile", args.factory
        )


def _packed(args: argparse.Namespace) -> dict[str, int]:
    from tq_lightning.export.packed import edit

    if args.add is not None:
        if (
            args.max_bits is not None
            or args.fold_norms
            or args.compress
            or not is_packed(args.source)
        ):
            raise UserError(
                "--add joins two packed files without changing them; "
                "pass only a packed file, --add and --out"
            )
        return edit.join(args.source, args.add, args.out)
    if not is_packed(args.source):
        options = {
            "max_bits": args.max_bits,
            "fold_norms": args.fold_norms,
            "compress": args.compress,
        }
        if args.rest is None:
            return save_checkpoint(args.source, args.out, args.factory, **options)
        with _temporary_folder(args.source) as folder:
            full = folder / "full.safetensors"
            save_checkpoint(args.source, full, args.factory, fold_norms=args.fold_norms)
            return _split(args, full)
    if args.fold_norms:
        _check_checkpoint(args.source)
    return _split(args, args.source)


def _split(args: argparse.Namespace, full: Path) -> dict[str, int]:
    """Write the first planes of a packed file, and with --rest the others: both files or none."""
    from tq_lightning.export.packed import edit

    if args.rest is None:
        return edit.repack(full, args.out, args.max_bits, args.compress)
    with atomic_write(args.rest) as temporary:
        edit.write_rest(full, temporary, args.max_bits)
        return edit.repack(full, args.out, args.max_bits, args.compress)


def _check_checkpoint(source: Path) -> None:
    """Raise UserError if --fold-norms is given with a packed file."""
    if is_packed(source):
        raise UserError("--fold-norms needs the checkpoint, not a packed file; pass the .ckpt file")


def _widest(path: Path) -> int:
    """Return the widest width that a packed file runs at."""
    from tq_lightning.export.packed.container import Container
    from tq_lightning.export.packed.header import read_header

    with Container(path) as file:
        header = read_header(file)
    return max(header["norm_widths"], default=header["stored_bits"])


def _onnx(args: argparse.Namespace, path: Path) -> None:
    try:
        from tq_lightning.export.onnx import dynamic, integer, qonnx, static
    except ImportError as error:
        raise UserError(
            f"--format {args.format} needs onnx and onnxscript ({error}); "
            "pip install 'tq_lightning[onnx]'"
        ) from error
    left_out: list[str] = []
    if args.integer:
        options = {"residual": args.residual, "top": args.activation_codes, "exact": args.exact}
        runtime = args.runtime or "onnxruntime"
        made = integer.export_integer(
            path, args.out, args.bits, runtime, **options, model=args.factory
        )
        print("\n".join(made.lines()))
    elif args.format == "onnx":
        left_out = static.export_static(
            path, args.out, args.bits, args.opset, args.lean, args.factory
        )
    elif args.format == "onnx-dynamic":
        left_out = dynamic.export_dynamic(path, args.out, model=args.factory)
    else:
        left_out = qonnx.export_qonnx(path, args.out, args.bits, args.factory)
    for name in left_out:
        print(f"  {name} is left out: the network does not call its layer")


def _executorch(args: argparse.Namespace, path: Path) -> None:
    from tq_lightning.export.executorch import export_executorch

    print("\n".join(export_executorch(path, args.out, args.bits, model=args.factory).lines()))
