"""Speed and memory of packed files: planes, switching, cold loads, memory held, latency of one image. Ratios in one run.

    python tests/benchmarks/bench_export.py [--out export.csv] [--model resnet50] [--vit vit_tiny_patch16_224] [--no-onnx]

Each ratio is of two medians measured alternately in one process. Weights are random: nothing here depends on their values.
Cold loads run in a process of their own, whose peak memory is the kernel's count; the file itself is in the page cache.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COLD = """
import json, resource, sys, time
import torch
import tq_lightning.export.load, tq_lightning.quant.prepare, tq_lightning.models, timm, safetensors.torch
start_kb, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
path, name, bits = sys.argv[1:4]
if bits == "float":
    model = tq_lightning.models.create_model(name)
    model.load_state_dict(safetensors.torch.load_file(path))
    read = __import__("os").path.getsize(path)
else:
    model = tq_lightning.export.load.load_packed(path, bits=int(bits), mode="lean")
    read = model.tq_file["bytes_read"]
seconds = time.perf_counter() - start
mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_kb) / 1024
print(json.dumps({"seconds": seconds, "mib": mib, "read": read}))
"""


def alternately(repeats, **calls):
    """Median seconds of each call, the calls taken in turn after one of each that is not counted."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Shown(list):
    """Rows that are printed as they come: a run takes minutes."""

    def append(self, row):
        print(f"{row[0]:<55} {row[1]:>16,.3f} {row[2]}", flush=True)
        super().append(row)


def planes(rows):
    import numpy as np

    from tq_lightning.export.planes import pack_planes, unpack_planes

    codes = np.random.default_rng(0).integers(0, 256, 1 << 24, dtype=np.uint8)
    packed, out = pack_planes(codes, 8), np.empty_like(codes)
    start = time.process_time()
    for _ in range(5):
        pack_planes(codes, 8)
    middle = time.process_time()
    for _ in range(5):
        unpack_planes(packed, codes.size, out)
    end = time.process_time()
    rows.append(("pack 8 planes", 5 * codes.nbytes / (middle - start) / 1e9, "GB/s a core", "CPU time; at least 1"))
    rows.append(("unpack 8 planes", 5 * codes.nbytes / (end - middle) / 1e9, "GB/s a core", "CPU time; at least 1"))


def switching(rows, prepared, path):
    import torch

    from tq_lightning import bit_width, load_packed
    from tq_lightning.export.packed import packed_weights
    from tq_lightning.quant.weight import weight_quantizers

    served = load_packed(path)
    weights, tensors = packed_weights(served), [(m, t) for _, m, t, _ in weight_quantizers(prepared)]
    turn = {"packed": 0, "float": 0}

    def step(model, pairs, key):
        turn[key] += 1
        with torch.no_grad(), bit_width(model, (8, 4, 2)[turn[key] % 3], "truncate"):
            for module, tensor in pairs:
                getattr(module, tensor)

    numbers = sum(m.parametrizations[t].original.numel() for _, m, t, _ in weights)
    source, target = torch.zeros(numbers * 5 // 2, dtype=torch.uint8), torch.zeros(numbers * 5 // 2, dtype=torch.uint8)
    pairs = [(m, t) for _, m, t, _ in weights]
    took = alternately(
        7,
        packed=lambda: step(served, pairs, "packed"),
        float=lambda: step(prepared, tensors, "float"),
        copy=lambda: target.copy_(source),
    )
    rows.append(("switch in place", 1000 * took["packed"], "ms", f"{5 * numbers:,} bytes touched: codes read, weights written"))
    rows.append(("requantize from float", 1000 * took["float"], "ms", "the same widths, the same tensors"))
    rows.append(("switch: times faster", took["float"] / took["packed"], "x", "at least 5"))
    rows.append(("switch: share of copy bandwidth", took["copy"] / took["packed"], "", "a copy that touches as many bytes"))


def memory(rows, path):
    from tq_lightning import load_packed

    lean = load_packed(path, mode="lean")
    held = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in (*lean.parameters(), *lean.buffers())}.values())
    codes = sum(t.numel() for t in lean.buffers() if t.element_size() == 1)
    largest = max(t.numel() for t in lean.buffers())
    size = path.stat().st_size
    rows.append(("lean: held / 8-bit file", held / size, "x", f"{held:,} bytes of tensors"))
    rows.append(("lean: held and largest weight made / file", (held + 4 * largest) / size, "x", "below 1.5"))
    rows.append(("resident: held / 8-bit file", (held + 4 * codes) / size, "x", "codes and one width's weights"))


def cold(rows, path, float_path, name):
    got = {}
    for label, at, bits in (("float", float_path, "float"), ("2 bits", path, "2")):
        runs = []
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", COLD, str(at), name, bits], capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        got[label] = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for key, unit in (("read", "bytes"), ("seconds", "s"), ("mib", "MiB above the imports at its peak")):
            rows.append((f"cold load, {label}: {key}", got[label][key], unit, ""))
    for key in ("read", "seconds", "mib"):
        rows.append((f"cold load, float / 2 bits: {key}", got["float"][key] / got["2 bits"][key], "x", ""))


def latency(rows, name, size, path, float_model, onnx):
    import numpy as np
    import torch

    from tq_lightning import bit_width, load_packed

    image = torch.randn(1, *size)
    resident, lean = load_packed(path), load_packed(path, mode="lean")

    def run(model, bits):
        with torch.inference_mode(), bit_width(model, bits):
            model(image)

    def plain():
        with torch.inference_mode():
            float_model(image)

    for bits in (8, 4, 2):
        took = alternately(15, float=plain, resident=lambda b=bits: run(resident, b), lean=lambda b=bits: run(lean, b))
        rows.append((f"{name}, PyTorch, float", 1000 * took["float"], "ms", "one image"))
        rows.append((f"{name}, PyTorch, resident at {bits} / float", took["resident"] / took["float"], "x", "at most 1.05"))
        rows.append((f"{name}, PyTorch, lean at {bits} / float", took["lean"] / took["float"], "x", ""))
    if not onnx:
        return
    import onnxruntime

    from tq_lightning.export.onnx import export_static

    folder = path.parent
    program = torch.onnx.export(float_model, (image,), input_names=["images"], dynamo=True, optimize=False, verbose=False)
    program.save(str(folder / "float.onnx"))

    def session(file):
        return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    floats, feed = session(folder / "float.onnx"), {"images": image.numpy().astype(np.float32)}
    for bits in (8, 4, 2):
        export_static(path, folder / f"{bits}.onnx", bits)
        fixed = session(folder / f"{bits}.onnx")
        took = alternately(15, float=lambda: floats.run(None, feed), static=lambda f=fixed: f.run(None, feed))
        rows.append((f"{name}, ONNX Runtime, float", 1000 * took["float"], "ms", "one image"))
        rows.append((f"{name}, ONNX Runtime, static at {bits} / float", took["static"] / took["float"], "x", ""))
        ratio = (folder / "float.onnx").stat().st_size / (folder / f"{bits}.onnx").stat().st_size
        rows.append((f"{name}, ONNX file, float / static at {bits}", ratio, "x", ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--vit", default="vit_tiny_patch16_224")
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True)
    a = parser.parse_args()

    from rich.console import Console
    from rich.table import Table
    from safetensors.torch import save_file

    from tq_lightning import prepare, save_packed
    from tq_lightning.models import create_model
    from tq_lightning.quant.norm import per_width_norms

    rows: list[tuple[str, float, str, str]] = Shown()
    planes(rows)
    with tempfile.TemporaryDirectory() as folder:
        for name in (a.model, a.vit):
            path, float_path = Path(folder) / f"{name}.safetensors", Path(folder) / f"{name}.float.safetensors"
            plain = create_model(name).eval()
            save_file(plain.state_dict(), float_path)
            prepared = create_model(name)
            prepare(prepared, skip=("first",), verbose=False)
            for norm in per_width_norms(prepared):
                norm.calibrated.fill_(True)
            save_packed(prepared.eval(), path)
            rows.append(
                (f"{name}, float file / packed file", float_path.stat().st_size / path.stat().st_size, "x", "all norm sets")
            )
            folded = save_packed(prepared, Path(folder) / "folded.safetensors", fold_norms=True)["total"]
            rows.append((f"{name}, float file / packed file, folded", float_path.stat().st_size / folded, "x", ""))
            if name == a.model:
                switching(rows, prepared, path)
                memory(rows, path)
                cold(rows, path, float_path, name)
            del prepared
            latency(rows, name, plain.pretrained_cfg["input_size"], path, plain, a.onnx)
    load = os.getloadavg()[0]
    rows.append(
        ("load average", load, "", "of the machine at the end: above the cores in use, timings are those of a busy machine")
    )
    table = Table("what", "value", "unit", "note", title="packed files")
    for what, value, unit, note in rows:
        table.add_row(what, f"{value:,.3f}", unit, note)
    Console().print(table)
    if a.out is not None:
        with open(a.out, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("what", "value", "unit", "note"))
            writer.writerows((what, f"{value:.4f}", unit, note) for what, value, unit, note in rows)


if __name__ == "__main__":
    main()
