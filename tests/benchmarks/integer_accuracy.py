"""Top-1 of packed files with float activations and on integers, by runtime and width, as CSV.

    python tests/benchmarks/integer_accuracy.py MODEL.safetensors [MODEL ...] --data digits \\
        [--root DIR] [--bits 8,4,2,1] [--runtimes float,pytorch,onnxruntime,openvino] \\
        [--images 1000] [--observer percentile] --out results/integer/accuracy.csv

Each row is appended as soon as it is measured. Rows that the file has are skipped, so the same
command resumes an interrupted run, and another environment adds its own runtime: `--runtimes
executorch` in that of ExecuTorch. `--keep FOLDER` keeps the predictions with float activations, so
that only one environment computes them.

Every image of the test split is scored, or its first `--images`. A file without activation ranges
is calibrated on batches of the training split. `lost` is the top-1 of `float` minus that of the
runtime, in percentage points. `differ` counts the images with a different predicted class. For a
network with trained activation codes, `float` is its own simulation. The two `exact` rows compute
the integers of PyTorch's mode in float64, with activation codes to 255 and to 127.

To add a runtime, write a function (packed file, bits) -> (images -> logits) and one row of
`RUNTIMES`.
"""

import argparse
import csv
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tq_lightning import calibrate_activations, load_packed
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.export.onnx.integer import export_integer
from tq_lightning.export.packed.edit import add_ranges
from tq_lightning.quant.activation_ranges import OBSERVERS, activation_ranges
from tq_lightning.quant.integer.model import integer_model

sys.path.insert(0, str(Path(__file__).parents[1]))

from fixtures.integer_oracle import simulated

BATCHES, BATCH_SIZE = 4, 128  # of the calibration
COLUMNS = ("model", "runtime", "bits", "images", "top1", "lost", "differ")

Predict = Callable[[Tensor], Tensor]


def float_activations(path: Path, bits: int) -> Predict:
    return load_packed(path, bits=bits)


def pytorch_integer(path: Path, bits: int) -> Predict:
    return load_packed(path, bits=bits, mode="integer")


def exact_integers(path: Path, bits: int, exact_sums: bool) -> Predict:
    model = integer_model(load_packed(path, bits=bits), exact_sums)

    def run(images: Tensor) -> Tensor:
        with simulated(model):
            return model(images)

    return run


def onnxruntime_integer(path: Path, bits: int) -> Predict:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.onnx"
        export_integer(path, graph, bits)
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino_integer(path: Path, bits: int) -> Predict:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "graph.onnx"
        export_integer(path, graph, bits, runtime="openvino")
        compiled = openvino.Core().compile_model(str(graph), "CPU")
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def executorch_integer(path: Path, bits: int) -> Predict:
    from executorch.runtime import Runtime

    from tq_lightning.export.executorch import export_executorch

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.pte"
        export_executorch(path, program, bits)
        loaded = Runtime.get().load_program(program.read_bytes())

    def predict(images: Tensor) -> Tensor:
        method = loaded.load_method("forward")  # reads the memory of `loaded`
        return torch.cat([method.execute([x[None].contiguous()])[0] for x in images])

    return predict


# (packed file with activation ranges, bits) -> (images -> logits); `float` comes first
RUNTIMES: dict[str, Callable[[Path, int], Predict]] = {
    "float": float_activations,
    "pytorch": pytorch_integer,
    "onnxruntime": onnxruntime_integer,
    "openvino": openvino_integer,
    "executorch": executorch_integer,
    "exact 255": functools.partial(exact_integers, exact_sums=True),
    "exact 127": functools.partial(exact_integers, exact_sums=False),
}


def predictions(predict: Predict, batches: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([predict(images).argmax(1) for images in batches])


def percent(classes: Tensor, labels: Tensor) -> float:
    return 100 * (classes == labels).double().mean().item()


def known_rows(out: Path) -> set[tuple[str, ...]]:
    """(model, runtime, bits, images) of the rows of a table."""
    if not out.exists():
        return set()
    with out.open(newline="", encoding="utf-8") as file:
        return {tuple(row[:4]) for row in csv.reader(file)}


def append(out: Path, row: tuple[object, ...]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if new else [row])


def test_split(args: argparse.Namespace, data: TQDataModule) -> tuple[list[Tensor], Tensor]:
    """Batches of the test split, or of its first images, and their labels."""
    data.setup("test")
    batches, labels, left = [], [], args.images or sys.maxsize
    for pixels, classes in data.test_dataloader():
        if left > 0:
            batches.append(data.normalize(pixels[:left]))
            labels.append(classes[:left])
            left -= len(pixels)
    return batches, torch.cat(labels)


def float_predictions(
    keep: Path | None, key: tuple[str, ...], path: Path, bits: int, batches: list[Tensor]
) -> Tensor:
    """Classes with float activations, read from `keep` if they are there."""
    kept = keep and keep / f"{key[0]}_{bits}_{key[3]}.pt"
    if kept and kept.exists():
        return torch.load(kept)
    found = predictions(float_activations(path, bits), batches)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, kept)
    return found


def calibrated(path: Path, data: TQDataModule, observer: str, folder: Path) -> Path:
    """Return the file itself if it has ranges, else a copy with calibrated ranges."""
    model = load_packed(path)
    if activation_ranges(model):
        return path
    batches = [images for images, _ in data.calibration_batches(BATCHES, BATCH_SIZE)]
    out = folder / path.name
    add_ranges(path, out, calibrate_activations(model, batches, observer))
    return out


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("models", nargs="+", type=Path)
    p.add_argument("--data", default="digits", help="data set, as data.name of a configuration")
    p.add_argument("--root", default="data", help="folder of the data set")
    p.add_argument("--bits", default="8,4,2,1")
    p.add_argument("--observer", choices=list(OBSERVERS), default="percentile")
    p.add_argument("--runtimes", default=",".join(RUNTIMES))
    p.add_argument("--images", type=int, help="images scored (default: the whole test split)")
    p.add_argument("--keep", type=Path, help="folder of the predictions with float activations")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    for path in args.models:
        options = load_packed(path).tq_file["preprocessing"] or {}
        size = options.get("input_size", [3, None, None])[-1]
        known = {key: options[key] for key in ("mean", "std") if key in options}
        data = TQDataModule(args.data, args.root, image_size=size, workers=0, **known)
        batches, labels = test_split(args, data)
        with tempfile.TemporaryDirectory() as folder:
            file = calibrated(path, data, args.observer, Path(folder))
            for bits in map(int, args.bits.split(",")):
                for name in args.runtimes.split(","):
                    key = (path.stem, name, str(bits), str(len(labels)))
                    if key in known_rows(args.out):
                        continue
                    expected = float_predictions(args.keep, key, file, bits, batches)
                    got = expected
                    if name != "float":
                        got = predictions(RUNTIMES[name](file, bits), batches)
                    top1, own = (
                        100 * (p == labels).double().mean().item() for p in (expected, got)
                    )
                    differ = int((got != expected).sum())
                    row = (*key, f"{own:.2f}", f"{top1 - own:.2f}", differ)
                    append(args.out, row)
                    print(*row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
