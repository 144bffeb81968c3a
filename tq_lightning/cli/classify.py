"""The verb `classify`: classify images with a packed file and write classes as CSV."""

import argparse
import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write

# retyped, because --help must not import torch; a test compares them
MODES = ("resident", "lean", "integer")
COLUMNS = ("image", "rank", "class", "name", "probability")


def parser() -> Parser:
    """Build the parser of the verb."""
    stray = "IMAGES is one image or one folder: pass a folder for several images"
    p = Parser("classify", stray, description=__doc__)
    p.add_argument("model", metavar="MODEL", type=Path, help="packed file written by `export`")
    p.add_argument(
        "images",
        metavar="IMAGES",
        type=Path,
        help="an image, or a folder to search recursively for images",
    )
    p.add_argument(
        "--bits", type=int, help="width to run at; only its planes are read (default: all)"
    )
    p.add_argument("--top", type=int, default=5, help="classes per image (default: 5)")
    p.add_argument("--out", type=Path, help="CSV file to write (default: standard output)")
    p.add_argument("--batch-size", type=int, default=16, help="images per batch (default: 16)")
    p.add_argument(
        "--mode",
        choices=MODES,
        help="resident (default): keep float weights; lean: compute weights layer by layer, less "
        "memory, more time; integer: integer kernels, needs activation ranges in the file",
    )
    p.add_argument(
        "--model.name",
        dest="factory",
        metavar="PACKAGE.MODULE:FACTORY",
        help="factory that MODEL names; it is imported only if you pass it",
    )
    p.add_argument("--lean", action="store_true", help="the same as --mode lean")
    return p


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: arguments after the verb.

    Returns:
        Exit status: 0, or 1 if some images could not be read. They are named on standard error.

    Raises:
        UserError: wrong arguments, a file that is not a model, or no image that can be read.
    """
    args = parser().parse_args(argv)
    for key in ("top", "batch_size"):
        if getattr(args, key) < 1:
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, key)}")
    if args.lean and args.mode not in (None, "lean"):
        raise UserError(f"--lean means --mode lean, got --mode {args.mode} too; pass only one")
    files = find_images(args.images)

    from tq_lightning.export.packed.container import Container
    from tq_lightning.export.packed.header import read_header
    from tq_lightning.export.packed.optional_fields import check_takes_images
    from tq_lightning.export.packed.reader import load_packed
    from tq_lightning.quant.integer import IntegerModel

    mode = "lean" if args.lean else args.mode or "resident"
    with Container(args.model) as file:
        check_takes_images(read_header(file), args.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "mode='integer' is not available")
        model = load_packed(args.model, bits=args.bits, model=args.factory, mode=mode)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if isinstance(model, IntegerModel):
        print(model.summary(), file=sys.stderr)
    if args.out is None:
        # file names that are not valid UTF-8 are written as raw bytes
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")
        return _report(len(files), _run(model, files, args, sys.stdout))
    if args.out.is_dir() or not args.out.parent.is_dir():
        reason = "it is a folder" if args.out.is_dir() else f"no folder {args.out.parent}"
        raise UserError(f"cannot write {args.out} ({reason})")
    if args.out.resolve() in {args.model.resolve(), *(path.resolve() for path in files)}:
        raise UserError(f"--out {args.out} would replace a file that is read; pass another name")
    with (
        atomic_write(args.out) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        skipped = _run(model, files, args, file)
    return _report(len(files), skipped)


def find_images(path: Path) -> list[Path]:
    """List the images below a folder, sorted, or the image itself.

    One line on standard error counts the skipped files.

    Raises:
        UserError: the path does not exist, or is a folder without images.
    """
    from tq_lightning.data.images import SUFFIXES, escape_undecodable, list_images

    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            escape_undecodable(f"no image or folder {path}; pass an image, or a folder of images")
        )
    found, left_out = list_images(path)
    if not found:
        raise UserError(
            escape_undecodable(f"no images found under {path} (supported: {', '.join(SUFFIXES)})")
        )
    if left_out.counts:
        print(f"{escape_undecodable(str(path))}: {left_out}", file=sys.stderr)
    return sorted(path / image for image in found)


def _run(model: Any, files: list[Path], args: argparse.Namespace, out: IO[str]) -> int:
    """Write the rows of all readable images. Return the number of unreadable ones."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from tq_lightning.data.images import escape_undecodable
    from tq_lightning.export.class_names import class_names
    from tq_lightning.quant.batches import call_model

    names = class_names(model.tq_file)
    rows, bad = csv.writer(out), []
    started = False
    batches = [files[i : i + args.batch_size] for i in range(0, len(files), args.batch_size)]
    errors = Console(stderr=True)
    for batch in track(
        batches,
        f"{len(files)} images",
        console=errors,
        disable=not errors.is_terminal and len(batches) < 2,
    ):
        good, pixels = [], []
        for path, value in read_preprocessed(model, batch):
            if isinstance(value, str):
                if files == [args.images]:
                    raise UserError(escape_undecodable(f"{path} {value}"))
                bad.append(path)
                print(escape_undecodable(f"skipped {path}: {value}"), file=sys.stderr)
            else:
                good.append(path)
                pixels.append(value)
        if not good:
            continue
        if not started:  # no header if no image can be read
            rows.writerow(COLUMNS)
            started = True
        with torch.inference_mode():
            logits = call_model(model, torch.stack(pixels))
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
            shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
            raise UserError(
                f"classify needs logits of shape (images, classes), but the network of "
                f"{args.model} returns {shape}; pass the file of a classifier"
            )
        probabilities = logits.float().softmax(1)
        values, classes = probabilities.topk(min(args.top, probabilities.shape[1]))
        for path, row, indices in zip(good, values.tolist(), classes.tolist(), strict=True):
            for rank, (value, index) in enumerate(zip(row, indices, strict=True), 1):
                name = names[index] if index < len(names) else str(index)
                rows.writerow([path, rank, index, name, f"{value:.6f}"])
    if len(bad) == len(files):
        raise UserError(
            escape_undecodable(f"none of {len(files)} images could be read, the first is {bad[0]}")
        )
    return len(bad)


def _report(count: int, skipped: int) -> int:
    """Print the number of classified and skipped images. Return the exit status."""
    images = "image" if count - skipped == 1 else "images"
    print(f"{count - skipped} {images} classified, {skipped} skipped", file=sys.stderr)
    return int(skipped > 0)


def read_preprocessed(model: Any, paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    """Yield each path with its normalized (channels, height, width) tensor, or with an error.

    Tensors have the type of the model's parameters, e.g. float16.
    """
    import torch
    from timm.data import create_transform

    from tq_lightning.data.images import UnreadableImage, read_image
    from tq_lightning.export.packed.optional_fields import input_size

    channels = input_size(model.tq_file)[0]
    options = model.tq_file["preprocessing"]
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform = create_transform(**{key: options[key] for key in keys if key in options})
    mode = "L" if channels == 1 else "RGB"
    dtypes = (value.dtype for value in model.parameters() if value.is_floating_point())
    dtype = next(dtypes, torch.float32)
    for path in paths:
        try:
            yield path, transform(read_image(path, mode)).to(dtype)
        except UnreadableImage as error:
            yield path, str(error)
