"""Latency of integer inference at 8, 4, 2 and 1 bits beside float, in every runtime, in one run.

    pip install -c constraints.txt -e '.[peers,openvino]'
    python tests/benchmarks/bench_latency.py [--out latency.csv] [--seconds 6] \\
        [--networks resnet18,resnet50] [--runtimes onnxruntime,openvino,torch] \\
        [--chart MODEL.safetensors DATA]

All runs of a network are timed in turn, so that other work affects them alike, and their medians
are compared with float in the same runtime. Weights of the four networks are random: latency does
not depend on them. The chart is of a trained network, by default the digits network of this
repository: top-1 on the whole test split as each runtime computes it, latency and bytes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from latency_runtimes import RUNTIMES, Network, Run, keep_traces, runs_of
from measuring import Table, keep_memory

from tq_lightning import calibrate_activations, load_packed, prepare, save_packed
from tq_lightning.models import create_model
from tq_lightning.quant.switchable_norm import per_width_norms

ROOT = Path(__file__).parents[2]
NETWORKS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenetv3": "mobilenetv3_large_100",
    "vit_tiny": "vit_tiny_patch16_224",
}
# integer over float of the same runtime, one thread, batch 1
AIMS = {
    ("resnet18", "ONNX Runtime"): 2.5,
    ("resnet50", "ONNX Runtime"): 2.2,
    ("resnet18", "OpenVINO"): 3.4,
    ("resnet50", "OpenVINO"): 3.4,
    ("resnet18", "PyTorch"): 3.2,
    ("resnet50", "PyTorch"): 3.2,
    ("vit_tiny", "ONNX Runtime"): 1.7,
}


def make_network(name: str, folder: Path) -> Network:
    """A timm network with random weights, packed and calibrated on noise."""
    torch.manual_seed(0)
    prepared = create_model(NETWORKS[name])
    prepare(prepared, verbose=False)
    for norm in per_width_norms(prepared):
        norm.calibrated.fill_(True)
    size = list(prepared.pretrained_cfg["input_size"])
    path = folder / f"{name}.safetensors"
    save_packed(prepared.eval(), path, preprocessing={"input_size": size})
    images = torch.randn(8, *size)
    linear = "vit" in name
    ranges = None if linear else calibrate_activations(load_packed(path), [images[:1]], widths=[8])
    return Network(name, path, create_model(NETWORKS[name]).eval(), images, ranges, folder)


def interleave(calls: dict[str, object], seconds: float) -> dict[str, float]:
    """Median seconds of calls that take turns: at least 5 rounds, at most 60."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or (rounds < 60 and time.perf_counter() - start < seconds):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def time_network(table: Table, network: Network, names: list[str], seconds: float) -> None:
    """Rows of one network: batch 1 and 8, one and two threads."""
    runs = list(runs_of(network, names))
    for threads in (1, 2):
        sessions = start_all(network.name, runs, threads)
        for batch in (1, 8):
            images = network.images[:batch].numpy()
            calls = {key: (lambda s=s, x=images: s(x)) for key, s in sessions.items()}
            took = interleave(calls, seconds)
            where = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
            for run in runs:
                key = f"{run.runtime}, {run.label}"
                if key not in took:
                    continue
                floats = took.get(f"{run.runtime}, float", took.get("PyTorch, float"))
                table.add(f"{network.name}, {where}, {key}", 1000 * took[key], "ms")
                if run.label != "float" and floats is not None:
                    aim = AIMS.get((network.name, run.runtime), "")
                    aimed = aim and run.bits and (batch, threads) == (1, 1)
                    table.add(
                        f"{network.name}, {where}, {key}: float / it",
                        floats / took[key],
                        "x",
                        f">= {aim}" if aimed else "",
                    )


def start_all(name: str, runs: list[Run], threads: int) -> dict[str, object]:
    """Sessions by "runtime, label"; one that does not start is said and left out."""
    sessions = {}
    for run in runs:
        try:
            sessions[f"{run.runtime}, {run.label}"] = run.start(threads)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            print(f"{name}, {run.runtime}: left out ({type(error).__name__}: {reason})")
    return sessions


def chart(table: Table, packed: Path, data: str, names: list[str], out: Path | None) -> None:
    """Accuracy, latency and bytes of one trained network in every runtime, and their picture."""
    from tq_lightning.data.datamodule import TQDataModule

    model = load_packed(packed)
    options = model.tq_file["preprocessing"]
    kept = {key: options[key] for key in ("mean", "std") if key in options}
    source = TQDataModule(data, image_size=options["input_size"][-1], workers=0, **kept)
    source.setup("test")
    batches = [(source.normalize(x).numpy(), y.numpy()) for x, y in source.test_dataloader()]
    seen = [x for x, _ in source.calibration_batches(4)]
    with tempfile.TemporaryDirectory() as folder:
        network = Network(
            model.tq_file["model"]["name"],
            packed,
            load_packed(packed),
            seen[0],
            calibrate_activations(model, seen),
            Path(folder),
        )
        runs = [run for run in runs_of(network, names) if run.bits is not None]
        sessions = start_all(network.name, runs, 1)
        image = batches[0][0][:1]
        took = interleave({k: (lambda s=s: s(image)) for k, s in sessions.items()}, 5)
        points = []
        for run in runs:
            key = f"{run.runtime}, {run.label}"
            session = sessions[key]
            right = sum(int((np.argmax(session(x), 1) == y).sum()) for x, y in batches)
            acc1 = 100 * right / sum(len(y) for _, y in batches)
            planes = load_packed(packed, bits=run.bits).tq_file["bytes_read"]
            where = f"{network.name} on {data}, {key}"
            table.add(f"{where}: top-1", acc1, "%")
            table.add(f"{where}: latency", 1000 * took[key], "ms", note="one image, one thread")
            table.add(f"{where}: bytes", planes, "bytes", note="planes and norms of the width")
            points.append((run.runtime, run.bits, acc1, 1000 * took[key], planes))
    if out is not None:
        draw(points, f"{network.name} on {data}", out.with_name("latency_accuracy_bytes.png"))


def draw(points: list[tuple[str, int, float, float, int]], title: str, out: Path) -> None:
    """Latency over top-1; the area of a mark is the bytes read, its number the width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    most = max(point[4] for point in points)
    for i, runtime in enumerate(dict.fromkeys(point[0] for point in points)):
        mine = [point for point in points if point[0] == runtime]
        axes.scatter(
            [p[3] for p in mine],
            [p[2] for p in mine],
            [500 * p[4] / most for p in mine],
            color=f"C{i}",
            alpha=0.5,
            label=runtime,
        )
        for _, bits, acc1, ms, _ in mine:
            axes.annotate(str(bits), (ms, acc1), ha="center", va="center", fontsize=8)
    axes.set(xlabel="latency of one image, one thread (ms)", ylabel="top-1 (%)", title=title)
    axes.set_xlim(left=0)
    axes.margins(0.15)
    legend = axes.legend(title=f"number: bits; area: bytes read (most {most:,})", fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    FigureCanvasAgg(figure).print_figure(str(out), dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0, help="per network, batch and threads")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    digits = [str(ROOT / "results" / "digits_example" / "model.safetensors"), "digits"]
    parser.add_argument("--chart", nargs=2, metavar=("MODEL", "DATA"), default=digits)
    a = parser.parse_args()
    keep_memory()
    keep_traces()
    table, names = Table(), a.runtimes.split(",")
    for name in filter(None, a.networks.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            time_network(table, make_network(name, Path(folder)), names, a.seconds)
    chart(table, Path(a.chart[0]), a.chart[1], [n for n in names if n != "torchao"], a.out)
    table.write(a.out)


if __name__ == "__main__":
    main()
