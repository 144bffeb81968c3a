"""Top-1 of packed files with float activations and on integers, by runtime and width, as CSV.

    python tests/benchmarks/integer_accuracy.py MODEL.safetensors [MODEL ...] --data digits \\
        [--root DIR] [--bits 8,4,2,1] [--observer percentile] [--out results/integer/accuracy.csv]

Every image of the test split is scored. A file without activation ranges is calibrated on batches
of the training split. `lost` is the top-1 of `float` minus that of the runtime, in percentage
points. `differ` counts the images with a different predicted class.

To add a runtime, write a function (packed file, bits) -> (images -> logits) and one row of
`RUNTIMES`.
"""

import argparse
import csv
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
from tq_lightning.quant.integer.oracle import simulated

BATCHES, BATCH_SIZE = 4, 128  # of the calibration
COLUMNS = ("model", "runtime", "bits", "images", "top1", "lost", "differ")

Predict = Callable[[Tensor], Tensor]


def float_activations(path: Path, bits: int) -> Predict:
    return load_packed(path, bits=bits)


def pytorch_integer(path: Path, bits: int) -> Predict:
    return load_packed(path, bits=bits, mode="integer")


def exact_integers(path: Path, bits: int) -> Predict:
    model = load_packed(path, bits=bits, mode="integer")

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


# (packed file with activation ranges, bits) -> (images -> logits); `float` comes first
RUNTIMES: dict[str, Callable[[Path, int], Predict]] = {
    "float": float_activations,
    "pytorch": pytorch_integer,
    "exact integers": exact_integers,
    "onnxruntime": onnxruntime_integer,
    "openvino": openvino_integer,
}


def predictions(predict: Predict, batches: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([predict(images).argmax(1) for images in batches])


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
    p.add_argument("--out", type=Path)
    args = p.parse_args(argv)
    rows = []
    for path in args.models:
        options = load_packed(path).tq_file["preprocessing"] or {}
        size = options.get("input_size", [3, None, None])[-1]
        known = {key: options[key] for key in ("mean", "std") if key in options}
        data = TQDataModule(args.data, args.root, image_size=size, workers=0, **known)
        data.setup("test")
        pairs = [(data.normalize(pixels), labels) for pixels, labels in data.test_dataloader()]
        batches, labels = [x for x, _ in pairs], torch.cat([y for _, y in pairs])
        with tempfile.TemporaryDirectory() as folder:
            file = calibrated(path, data, args.observer, Path(folder))
            for bits in map(int, args.bits.split(",")):
                expected = predictions(RUNTIMES["float"](file, bits), batches)
                top1 = 100 * (expected == labels).double().mean().item()
                for name in args.runtimes.split(","):
                    got = predictions(RUNTIMES[name](file, bits), batches)
                    own = 100 * (got == labels).double().mean().item()
                    differ = int((got != expected).sum())
                    row = (path.stem, name, bits, len(labels), f"{own:.2f}", f"{top1 - own:.2f}")
                    rows.append((*row, differ))
                    print(*rows[-1], flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
