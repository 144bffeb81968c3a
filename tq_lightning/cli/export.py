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
    a = parse(argv)
    if a.format == "packed":
        sizes = _packed(a) if a.calibrate is None else _calibrated(a)
        print("\n".join(f"{name:<10}{size:>14,} bytes" for name, size in sizes.items()))
        print(f"wrote {a.out}")
        return 0
    with packed_file(a.source, a.factory, fold_norms=a.fold_norms) as (path, folder):
        if a.calibrate is not None:
            before, path = path, folder / "calibrated.safetensors"
            calibrate(before, path, a.source, a.calibrate, a.observer or "percentile", a.factory)
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
        UserError: raised by the body; paths of temporary files are replaced by `source`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), source
        try:
            if not is_packed(path):
                path = folder / "model.safetensors"
                save_checkpoint(source, path, factory, **options)
            yield path, folder
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


def _calibrated(a: argparse.Namespace) -> dict[str, int]:
    """Write a packed file with activation ranges; nothing is written if they can't be observed."""
    with tempfile.TemporaryDirectory() as folder:
        out, a.out = a.out, Path(folder) / "packed.safetensors"
        _packed(a)
        path, a.out = a.out, out
        return calibrate(path, out, a.source, a.calibrate, a.observer or "percentile", a.factory)


def _packed(a: argparse.Namespace) -> dict[str, int]:
    from tq_lightning.export.packed import edit as repack

    if a.add is not None:
        if a.max_bits is not None or a.fold_norms or a.compress or not is_packed(a.source):
            raise UserError(
                "--add joins two packed files without changing them; "
                "pass only a packed file, --add and --out"
            )
        return repack.join(a.source, a.add, a.out)
    if not is_packed(a.source):
        options = {"max_bits": a.max_bits, "fold_norms": a.fold_norms, "compress": a.compress}
        if a.rest is None:
            return save_checkpoint(a.source, a.out, a.factory, **options)
        with tempfile.TemporaryDirectory() as folder:
            full = Path(folder) / "full.safetensors"
            save_checkpoint(a.source, full, a.factory, fold_norms=a.fold_norms)
            repack.write_rest(full, a.rest, a.max_bits)
            return repack.repack(full, a.out, a.max_bits, a.compress)
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
        options = {"residual": a.residual, "top": a.activation_codes, "exact": a.exact}
        runtime = a.runtime or "onnxruntime"
        made = integer.export_integer(path, a.out, a.bits, runtime, **options, model=a.factory)
        print("\n".join(made.lines()))
    elif a.format == "onnx":
        static.export_static(path, a.out, a.bits, a.opset, a.lean, a.factory)
    elif a.format == "onnx-dynamic":
        dynamic.export_dynamic(path, a.out, model=a.factory)
    else:
        qonnx.export_qonnx(path, a.out, a.bits, a.factory)


def _executorch(a: argparse.Namespace, path: Path) -> None:
    from tq_lightning.export.executorch import export_executorch

    print("\n".join(export_executorch(path, a.out, a.bits, model=a.factory).lines()))
