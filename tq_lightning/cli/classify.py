"""The verb `classify`: images through a packed file at a chosen width; classes and probabilities as CSV."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
COLUMNS = ("image", "rank", "class", "name", "probability")


def main(argv: list[str]) -> int:
    """Runs the verb. Returns 0, or 1 where some images could not be read (they are named on standard error).

    Raises:
        UserError: bad arguments, a file that is no model, no image that can be read.
    """
    p = Parser("classify", description=__doc__)
    p.add_argument("model", metavar="MODEL", type=Path, help="a packed file written by `export`")
    p.add_argument(
        "images",
        metavar="IMAGES",
        type=Path,
        help="an image, or a folder searched for images at any depth",
    )
    p.add_argument(
        "--bits", type=int, help="width to run at; only the planes it needs are read (default: all)"
    )
    p.add_argument("--top", type=int, default=5, help="classes per image (default: 5)")
    p.add_argument(
        "--out", type=Path, help="CSV file to write, whole or not at all (default: standard output)"
    )
    p.add_argument("--batch-size", type=int, default=16, help="images at a time (default: 16)")
    p.add_argument(
        "--lean",
        action="store_true",
        help="make the weights layer by layer: less memory, more time",
    )
    a = p.parse_args(argv)
    for key in ("top", "batch_size"):
        if getattr(a, key) < 1:
            raise UserError(f"--{key.replace('_', '-')} must be at least 1, got {getattr(a, key)}")
    files = find_images(a.images)

    from tq_lightning.export.packed.reader import load_packed

    model = load_packed(a.model, bits=a.bits, mode="lean" if a.lean else "resident")
    if a.out is None:
        return _run(model, files, a, sys.stdout)
    if a.out.is_dir() or not a.out.parent.is_dir():
        raise UserError(
            f"cannot write {a.out} ({'it is a folder' if a.out.is_dir() else f'no folder {a.out.parent}'})"
        )
    with atomic_write(a.out) as temporary, temporary.open("w", newline="") as file:
        return _run(model, files, a, file)


def find_images(path: Path) -> list[Path]:
    """The image itself, or all images below a folder, sorted.

    Raises:
        UserError: no such file or folder, or a folder without images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no image or folder {path}")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"no images under {path}; known are {', '.join(SUFFIXES)}")
    return found


def _run(model: Any, files: list[Path], a: Any, out: IO[str]) -> int:
    import torch
    from rich.console import Console
    from rich.progress import track

    names = _names(model)
    rows, bad = csv.writer(out), []
    rows.writerow(COLUMNS)
    batches = [files[i : i + a.batch_size] for i in range(0, len(files), a.batch_size)]
    errors = Console(stderr=True)
    for batch in track(
        batches,
        f"{len(files)} images",
        console=errors,
        disable=not errors.is_terminal and len(batches) < 2,
    ):
        good, pixels = [], []
        for path, value in _read(model, batch):
            if isinstance(value, str):
                if files == [a.images]:
                    raise UserError(f"{path} {value}")
                bad.append(path)
                print(f"skipped {path}: {value}", file=sys.stderr)
            else:
                good.append(path)
                pixels.append(value)
        if not good:
            continue
        with torch.inference_mode():
            probabilities = model(torch.stack(pixels)).float().softmax(1)
        values, classes = probabilities.topk(min(a.top, probabilities.shape[1]))
        for path, row, indices in zip(good, values.tolist(), classes.tolist(), strict=True):
            for rank, (value, index) in enumerate(zip(row, indices, strict=True), 1):
                rows.writerow([path, rank, index, names(index), f"{value:.6f}"])
    if len(bad) == len(files):
        raise UserError(f"none of {len(files)} images could be read, the first is {bad[0]}")
    print(f"{len(files) - len(bad)} images classified, {len(bad)} skipped", file=sys.stderr)
    return int(bool(bad))


def _names(model: Any) -> Any:
    """Class number -> name: the file's, ImageNet's for a network of 1000 classes, else the number."""
    known = model.tq_file["class_names"]
    if known:
        return lambda index: known[index] if index < len(known) else str(index)
    if model.tq_file["model"]["num_classes"] == 1000:
        from timm.data import ImageNetInfo

        return ImageNetInfo().index_to_description
    return str


def _read(model: Any, paths: list[Path]) -> Iterator[tuple[Path, Any]]:
    """Each path with its normalised (3, height, width) tensor, or with what is wrong with it."""
    from PIL import Image
    from timm.data import create_transform

    how = dict(model.tq_file["preprocessing"] or {})
    if "input_size" not in how:
        raise UserError(
            "the packed file does not say how images reach its network; export it with preprocessing="
        )
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform = create_transform(**{key: how[key] for key in keys if key in how})
    mode = "L" if how["input_size"][0] == 1 else "RGB"
    for path in paths:
        try:
            with Image.open(path) as image:
                yield path, transform(image.convert(mode))
        except Exception as error:  # PIL raises whatever a broken file makes its decoders do
            yield path, f"cannot be read as an image ({' '.join(str(error).split())[:100]})"
