"""Compare the predictions of a trained checkpoint in every exported form with the recorded `test`.

    python tests/benchmarks/export_agreement.py RUN/checkpoints/best.ckpt --data-root DATA \\
        --out results/export

Top-1 on the test images at every width is measured with the packed file in PyTorch, with weights of
the NumPy reader, and with static and dynamic ONNX graphs. Sizes, bytes read and the latency of one
image follow. The tables are agreement.csv and sizes.csv. In the latter, `times_smaller` is relative
to a safetensors file of float weights and one norm set, and `gain` to the plain packed file.
"""

import argparse
import csv
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tq_lightning import bit_width, load_packed
from tq_lightning.cli.export import save_checkpoint
from tq_lightning.export.onnx.dynamic import export_dynamic
from tq_lightning.export.onnx.static import export_static
from tq_lightning.export.packed.weight import packed_weights
from tq_lightning.models import create_model
from tq_lightning.training.checkpoint import load_checkpoint_model

READER = Path(__file__).parents[2] / "docs" / "read_packed.py"


def test_images(run, data_root):
    """(normalized images (N, 3, h, w), labels) of the run's test split."""
    from tq_lightning.data.datamodule import TQDataModule

    config = json.loads((run / "record.json").read_text())["config"]["data"]
    data = TQDataModule(**{**config, **({"root": data_root} if data_root else {})})
    data.prepare_data()
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def hits(call, images, labels, batch=500):
    return sum(
        int((np.asarray(call(x)).argmax(1) == y.numpy()).sum())
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )


def latency(call, image, repeats=20):
    call(image)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(image)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[repeats // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-root")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True)
    a = parser.parse_args()
    run = a.checkpoint.parent.parent
    a.out.mkdir(parents=True, exist_ok=True)
    recorded = json.loads((run / "record.json").read_text()).get("test", {}).get("metrics", {})
    images, labels = test_images(run, a.data_root)
    spec = importlib.util.spec_from_file_location("read_packed", READER)
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)

    work = a.checkpoint.parent.parent / "export"
    work.mkdir(exist_ok=True)
    path = work / "model.safetensors"
    hparams = load_checkpoint_model(a.checkpoint)[1]
    plain = create_model(hparams["name"], hparams["num_classes"], **(hparams["model_args"] or {}))
    save_file(plain.state_dict(), work / "float.safetensors")
    sizes = {
        "float file": (work / "float.safetensors").stat().st_size,
        "float parameters alone": 4 * sum(p.numel() for p in plain.parameters()),
        "packed": save_checkpoint(a.checkpoint, path)["total"],
    }
    for label, how in (
        ("packed, folded", {"fold_norms": True}),
        ("packed, compressed", {"compress": True}),
        ("packed, folded and compressed", {"fold_norms": True, "compress": True}),
        ("packed, 4 planes", {"max_bits": 4}),
        ("packed, 2 planes", {"max_bits": 2}),
    ):
        sizes[label] = save_checkpoint(a.checkpoint, work / "other.safetensors", **how)["total"]

    served, dynamic = load_packed(path), None
    if hparams.get("channels_last"):
        served.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if a.onnx:
        import onnxruntime

        export_dynamic(path, work / "dynamic.onnx")
        sizes["onnx, dynamic"] = (work / "dynamic.onnx").stat().st_size
        dynamic = onnxruntime.InferenceSession(
            str(work / "dynamic.onnx"), providers=["CPUExecutionProvider"]
        )
    rows = []
    widths = packed_weights(served)[0].packed.widths
    for bits in sorted(widths, reverse=True):
        with torch.inference_mode(), bit_width(served, bits):
            row = {"bits": bits, "images": len(labels), "pytorch": hits(served, images, labels)}
            row["ms_pytorch"] = round(latency(served, images[:1]), 3)
        key = f"test/acc1_truncate_w{bits}"
        row["recorded"] = round(recorded[key] * len(labels) / 100) if key in recorded else ""
        alone = load_packed(path, bits=bits)
        row["bytes_read"] = alone.tq_file["bytes_read"]
        made = reader.weights(path, bits)
        same = [
            np.array_equal(made[w.name], getattr(w.module, w.tensor).detach().numpy())
            for w in packed_weights(alone)
        ]
        row["numpy_reader_weights_equal"] = all(same)
        if dynamic is not None:
            static = work / f"static{bits}.onnx"
            export_static(path, static, bits)
            fixed = onnxruntime.InferenceSession(str(static), providers=["CPUExecutionProvider"])

            def run_static(x, fixed=fixed):
                return fixed.run(None, {"images": x.contiguous().numpy()})[0]

            def run_dynamic(x, bits=bits):
                return dynamic.run(
                    None, {"images": x.contiguous().numpy(), "bits": np.array(bits)}
                )[0]

            row |= {
                "onnx_static": hits(run_static, images, labels),
                "onnx_dynamic": hits(run_dynamic, images, labels),
            }
            row |= {
                "ms_onnx_static": round(latency(run_static, images[:1]), 3),
                "bytes_onnx_static": static.stat().st_size,
            }
            row["ms_onnx_dynamic"] = round(latency(run_dynamic, images[:1]), 3)
        rows.append(row)
    whole = [
        {
            "what": what,
            "bytes": size,
            "times_smaller": round(sizes["float file"] / size, 3),
            "gain": round(sizes["packed"] / size, 3) if what.startswith("packed,") else "",
        }
        for what, size in sizes.items()
    ]
    for name, table in (("agreement", rows), ("sizes", whole)):
        with open(a.out / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        shown = Table(*table[0], title=name)
        for row in table:
            shown.add_row(*map(str, row.values()))
        Console().print(shown)
    served_as = ("recorded", "onnx_static", "onnx_dynamic")
    agree = all(
        r["numpy_reader_weights_equal"]
        and all(r.get(k, "") in ("", r["pytorch"]) for k in served_as)
        for r in rows
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
