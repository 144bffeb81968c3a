"""Speed and memory of packed files: planes, width switches, cold loads, latency of one image.

    python tests/benchmarks/bench_export.py [--out export.csv] [--model resnet50] \\
        [--vit vit_tiny_patch16_224] [--no-onnx]

Each ratio compares two medians that are measured alternately in one process. Weights are random,
because no result depends on their values. Each load runs in a new process, after the file is
dropped from the page cache if the system allows it. Memory is the resident memory of that process
(Linux) minus that of its imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import Table, alternately

REPEATS = 31  # of one image

LOAD = """
import gc, json, os, sys, time
import torch
import tq_lightning.export.packed.reader, tq_lightning.quant.prepare, tq_lightning.models
import timm, safetensors.torch

def mib(key):  # ru_maxrss would not do: a child inherits the peak of its parent
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

path, name, mode, bits = sys.argv[1:5]
image = torch.randn(1, *json.loads(sys.argv[5]))
with open(path, "rb") as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before, start = mib("VmRSS"), time.perf_counter()
if mode == "float":
    model = tq_lightning.models.create_model(name).eval()
    model.load_state_dict(safetensors.torch.load_file(path))
    read = os.path.getsize(path)
else:
    model = tq_lightning.export.packed.reader.load_packed(path, bits=int(bits) or None, mode=mode)
    read = model.tq_file["bytes_read"]
out = {"read": read, "seconds": time.perf_counter() - start, "peak": mib("VmHWM") - before}
gc.collect()
out["held"] = mib("VmRSS") - before
with torch.inference_mode():
    model(image)
out["pass_peak"], out["pass_held"] = mib("VmHWM") - before, mib("VmRSS") - before
print(json.dumps(out))
"""


def planes(table):
    import numpy as np

    from tq_lightning.quant.bit_planes import pack_planes, unpack_planes

    codes = np.random.default_rng(0).integers(0, 256, 1 << 24, dtype=np.uint8)
    packed, out = pack_planes(codes, 8), np.empty_like(codes)
    calls = {
        "pack": lambda: pack_planes(codes, 8),
        "unpack": lambda: unpack_planes(packed, codes.size, out),
    }
    for name, call in calls.items():
        times = []
        for _ in range(5):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        table.add(
            f"{name} 8 planes",
            codes.nbytes / min(times) / 1e9,
            "GB/s",
            ">= 1",
            "of a core's time, best of 5",
        )


def switching(table, prepared, path):
    import torch

    from tq_lightning import bit_width, load_packed
    from tq_lightning.export.packed.weight import packed_weights
    from tq_lightning.quant.quantized_tensors import weight_quantizers

    served = load_packed(path)
    weights, tensors = (
        packed_weights(served),
        [(w.module, w.tensor) for w in weight_quantizers(prepared)],
    )
    turn = {"packed": 0, "float": 0}

    def step(model, pairs, key):
        turn[key] += 1
        with torch.no_grad(), bit_width(model, (8, 4, 2)[turn[key] % 3], "truncate"):
            for module, tensor in pairs:
                getattr(module, tensor)

    numbers = sum(w.codes.numel() for w in weights)
    source, target = (
        torch.zeros(numbers * 5 // 2, dtype=torch.uint8),
        torch.zeros(numbers * 5 // 2, dtype=torch.uint8),
    )
    pairs = [(w.module, w.tensor) for w in weights]
    took = alternately(
        7,
        packed=lambda: step(served, pairs, "packed"),
        float=lambda: step(prepared, tensors, "float"),
        copy=lambda: target.copy_(source),
    )
    seconds = {name: call.clock for name, call in took.items()}
    note = f"{5 * numbers:,} bytes touched: codes read, weights written"
    table.add("switch in place", 1000 * seconds["packed"], "ms", note=note)
    table.add(
        "requantize from float",
        1000 * seconds["float"],
        "ms",
        note="the same widths, the same tensors",
    )
    table.add(
        "requantize from float / switch in place", seconds["float"] / seconds["packed"], "x", ">= 5"
    )
    table.add("copy of as many bytes / switch in place", seconds["copy"] / seconds["packed"], "x")


def loads(table, path, float_path, name, size):
    """Measure cold loads and the memory of a loaded model, float against packed."""
    cases = {
        "float": (float_path, "float", 0),
        "2 bits": (path, "lean", 2),
        "lean": (path, "lean", 0),
    }
    got = {}
    for label, (at, mode, bits) in {**cases, "resident": (path, "resident", 0)}.items():
        argv = [sys.executable, "-c", LOAD, str(at), name, mode, str(bits), json.dumps(size)]
        runs = []
        for _ in range(3):
            done = subprocess.run(argv, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        got[label] = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    for label in ("float", "2 bits"):
        for key, unit in (("read", "bytes"), ("seconds", "s"), ("peak", "MiB")):
            table.add(f"cold load, {label}: {key}", got[label][key], unit)
    for key in ("read", "seconds", "peak"):
        table.add(
            f"cold load, float / 2 bits: {key}", got["float"][key] / max(got["2 bits"][key], 1e-9)
        )
    file_mib = path.stat().st_size / 2**20
    for label, aim, note in (
        ("float", "", ""),
        ("lean", "<= 1.5", "all widths"),
        ("resident", "", "all widths; codes and one width's weights"),
    ):
        table.add(
            f"{label}: held after the load / 8-bit file",
            got[label]["held"] / file_mib,
            "x",
            aim,
            note,
        )
        table.add(
            f"{label}: held after a pass / 8-bit file",
            got[label]["pass_held"] / file_mib,
            note="one image",
        )
        table.add(
            f"{label}: peak of load and pass",
            got[label]["pass_peak"],
            "MiB",
            note="with the activations of one image",
        )


def latency(table, name, size, path, float_model, onnx):
    import numpy as np
    import torch

    from tq_lightning import bit_width, load_packed

    image = torch.randn(1, *size)
    resident, lean = load_packed(path), load_packed(path, mode="lean")

    def run(model):
        with torch.inference_mode():
            model(image)

    def enter():
        with bit_width(resident, 4):
            pass

    for bits in (8, 4, 2):
        with bit_width(resident, bits), bit_width(lean, bits):
            took = alternately(
                REPEATS,
                float=lambda: run(float_model),
                resident=lambda: run(resident),
                lean=lambda: run(lean),
            )
        base = took["float"].clock
        table.add(f"{name}, PyTorch, float", 1000 * base, "ms", note="one image")
        table.add(
            f"{name}, PyTorch, resident at {bits} / float",
            took["resident"].clock / base,
            "x",
            "<= 1.05",
        )
        table.add(f"{name}, PyTorch, lean at {bits} / float", took["lean"].clock / base)
    entering = alternately(REPEATS, enter=enter)["enter"].clock
    table.add(f"{name}, PyTorch, entering bit_width", 1000 * entering, "ms", note="no weights made")
    if not onnx:
        return
    import onnxruntime

    from tq_lightning.export.onnx.dynamic import export_dynamic
    from tq_lightning.export.onnx.static import export_static

    folder = path.parent
    program = torch.onnx.export(
        float_model, (image,), input_names=["images"], dynamo=True, optimize=False, verbose=False
    )
    program.save(str(folder / "float.onnx"))
    export_dynamic(path, folder / "dynamic.onnx")

    def session(file, fold=False):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # otherwise threads of the previous session would busy-wait on the cores of the one being
        # timed
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if fold:  # DequantizeLinear is folded at load, as "resident" does
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    floats, feed = session(folder / "float.onnx"), {"images": image.numpy().astype(np.float32)}
    dynamic = session(folder / "dynamic.onnx")
    for bits in (8, 4, 2):
        export_static(path, folder / f"{bits}.onnx", bits, lean=True)
        folded, fixed = (
            session(folder / f"{bits}.onnx", fold=True),
            session(folder / f"{bits}.onnx"),
        )
        took = alternately(
            REPEATS,
            float=lambda: floats.run(None, feed),
            folded=lambda f=folded: f.run(None, feed),
            static=lambda f=fixed: f.run(None, feed),
            dynamic=lambda b=bits: dynamic.run(None, {**feed, "bits": np.array(b)}),
        )
        base = took["float"].clock
        table.add(f"{name}, ONNX Runtime, float", 1000 * base, "ms", note="one image")
        for key, label, aim, note in (
            (
                "folded",
                "static, folded",
                "<= 1.05",
                "weights made at load (session.disable_quant_qdq=1)",
            ),
            ("static", "static", "", "weights made at every run (default)"),
            ("dynamic", "dynamic", "", "weights made at every run"),
        ):
            table.add(
                f"{name}, ONNX Runtime, {label} at {bits} / float",
                took[key].clock / base,
                "x",
                aim,
                note,
            )
        ratio = (folder / "float.onnx").stat().st_size / (folder / f"{bits}.onnx").stat().st_size
        table.add(f"{name}, ONNX file, float / static at {bits}", ratio)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--vit", default="vit_tiny_patch16_224")
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True)
    a = parser.parse_args()

    from safetensors.torch import save_file

    from tq_lightning import prepare, save_packed
    from tq_lightning.models import create_model
    from tq_lightning.quant.switchable_norm import per_width_norms

    table = Table()
    planes(table)
    with tempfile.TemporaryDirectory() as folder:
        for name in (a.model, a.vit):
            path, float_path = (
                Path(folder) / f"{name}.safetensors",
                Path(folder) / f"{name}.float.safetensors",
            )
            plain = create_model(name).eval()
            save_file(plain.state_dict(), float_path)
            prepared = create_model(name)
            prepare(prepared, skip=("first",), verbose=False)
            for norm in per_width_norms(prepared):
                norm.calibrated.fill_(True)
            save_packed(prepared.eval(), path)
            ratio = float_path.stat().st_size / path.stat().st_size
            table.add(f"{name}, float file / packed file", ratio, note="all norm sets")
            folded = save_packed(prepared, Path(folder) / "folded.safetensors", fold_norms=True)[
                "total"
            ]
            table.add(
                f"{name}, float file / packed file, folded", float_path.stat().st_size / folded
            )
            if name == a.model:
                switching(table, prepared, path)
                loads(table, path, float_path, name, plain.pretrained_cfg["input_size"])
            del prepared
            latency(table, name, plain.pretrained_cfg["input_size"], path, plain, a.onnx)
    table.write(a.out)


if __name__ == "__main__":
    main()
