"""Latency of integer inference at 8, 4, 2 and 1 bits relative to float, in every runtime.

    pip install -c constraints.txt -e '.[peers,openvino]'
    python tests/benchmarks/bench_latency.py [--out latency.csv] [--seconds 20] \\
        [--networks resnet18,resnet50] [--runtimes onnxruntime,openvino,torch,executorch,torchao] \\
        [--batches 1,8] [--threads 1,2] [--executorch .venv-executorch/bin/python]

Runs of a network alternate, so that other load affects them equally. The speedup compares medians
of process time, which excludes other programs, with float in the same runtime. The table also has
wall times. Weights are random, because latency does not depend on them.

Each row is written as soon as it is measured. An interrupted command can be repeated: it keeps the
rows of this processor and these versions, and the graphs and programs in --work. At the end, a
chart of latency, accuracy and bytes is drawn next to the table (see latency_chart.py).
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import latency_ceiling
import latency_chart
import latency_runtimes
import numpy as np
import torch
from latency_runtimes import RUNTIMES, VERSIONS, Network, Run, Session, reason_of, runs_of
from latency_table import LatencyTable
from measuring import Timing, keep_memory

from tq_lightning import calibrate_activations, load_packed, prepare, save_packed
from tq_lightning.export.packed.edit import add_ranges
from tq_lightning.models import create_model
from tq_lightning.quant.activation_ranges import activation_ranges
from tq_lightning.quant.switchable_norm import per_width_norms

ROOT = Path(__file__).parents[2]
ACCURACY = ROOT / "results" / "integer" / "accuracy.csv"  # of the network of the chart
NETWORKS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenetv3": "mobilenetv3_large_100",
    "vit_tiny": "vit_tiny_patch16_224",
    "resnet20_cifar": "resnet20_cifar",  # of the chart
}
# (network, runtime): float over integer, process time, batch 1, one thread
AIMS = {
    ("resnet18", "ONNX Runtime"): 2.5,
    ("resnet50", "ONNX Runtime"): 2.2,
    ("resnet18", "OpenVINO"): 3.4,
    ("resnet50", "OpenVINO"): 3.4,
    ("resnet18", "PyTorch"): 3.2,
    ("resnet50", "PyTorch"): 3.2,
    ("vit_tiny", "ONNX Runtime"): 1.7,
}
MOST_ROUNDS, LEAST_ROUNDS = 60, 5


def make_network(name: str, folder: Path) -> Network:
    """Pack a network with random weights and activation ranges calibrated on noise."""
    if name == latency_ceiling.NAME:
        return Network(name, "", folder, torch.zeros(8), {}, folder)
    torch.manual_seed(0)
    prepared = create_model(NETWORKS[name])
    config = getattr(prepared, "pretrained_cfg", None) or {}
    size = list(config.get("input_size", (3, 32, 32)))
    images = torch.randn(8, *size)
    path = folder / f"{name}.safetensors"
    if not path.exists():
        prepare(prepared, verbose=False)
        for norm in per_width_norms(prepared):
            norm.calibrated.fill_(True)
        plain = folder / f"{name}.plain.safetensors"
        save_packed(prepared.eval(), plain, preprocessing={"input_size": size})
        ranges = calibrate_activations(load_packed(plain), [images[:1]], widths=[8])
        add_ranges(plain, path, ranges)
    ranges = activation_ranges(load_packed(path))
    return Network(name, NETWORKS[name], path, images, ranges, folder)


def start_all(network: Network, runs: list[Run], threads: int, batch: int) -> dict[Run, Session]:
    """Start the sessions of the runs. Print and skip those that fail."""
    sessions = {}
    for run in runs:
        try:
            session = run.start(threads, batch)
            session.timed(network.images[:batch].numpy())
        except Exception as error:
            print(f"{network.name}, {run.runtime}, {run.weights}: left out ({reason_of(error)})")
        else:
            sessions[run] = session
    return sessions


def take_turns(
    sessions: dict[Run, Session], images: np.ndarray, seconds: float
) -> tuple[dict[Run, Timing], int]:
    """Return (medians of the sessions, number of rounds). Short runs follow a warm-up run."""
    times: dict[Run, list[Timing]] = {run: [] for run in sessions}
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - start < seconds):
        for run, session in sessions.items():
            if not times[run] or times[run][-1].clock < 0.2:
                session.timed(images)
            times[run].append(session.timed(images))
        rounds += 1
    medians = {
        run: Timing(*map(statistics.median, zip(*rows, strict=True))) for run, rows in times.items()
    }
    return medians, rounds


def time_network(
    table: LatencyTable,
    network: Network,
    runtimes: list[str],
    threads: int,
    batch: int,
    seconds: float,
) -> None:
    """Add rows of a network at a number of threads and a batch size, unless the table has them."""
    runs: list[Run] = []
    versions = {}
    for name in runtimes:
        where = {"network": network.name, "threads": threads, "batch": batch}
        try:
            version = VERSIONS[name]()
        except Exception as error:
            print(f"{network.name}, {name}: left out ({reason_of(error)})", flush=True)
            continue
        makers = latency_ceiling.RUNTIMES if network.name == latency_ceiling.NAME else RUNTIMES
        if name in makers and not table.has(version=version, **where):
            found = runs_of(network, name, makers[name])
            runs += found
            versions.update({run.runtime: version for run in found})
    sessions = start_all(network, runs, threads, batch)
    took, rounds = take_turns(sessions, network.images[:batch].numpy(), seconds)
    floats = {run.runtime: took[run] for run in took if run.weights == "float"}
    for run in took:
        aim = AIMS.get((network.name, run.runtime)) if "bit" in run.weights else None
        table.add(
            network.name,
            run.runtime,
            run.weights,
            batch,
            threads,
            took[run],
            floats.get(run.runtime),
            rounds,
            run.bytes,
            versions[run.runtime],
            aim if (batch, threads) == (1, 1) else None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="per network and setting")
    parser.add_argument("--networks", default=",".join([latency_ceiling.NAME, *NETWORKS]))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--executorch", default=str(ROOT / ".venv-executorch" / "bin" / "python"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "latency")
    a = parser.parse_args()
    # otherwise OpenMP threads would busy-wait while another runtime is being timed
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_memory()
    latency_runtimes.EXECUTORCH[:] = [a.executorch]
    latency_runtimes.keep_traces()
    a.work.mkdir(parents=True, exist_ok=True)
    table = LatencyTable(a.out)
    for threads in map(int, a.threads.split(",")):
        torch.set_num_threads(threads)
        for batch in map(int, a.batches.split(",")):
            for name in a.networks.split(","):
                network = make_network(name, a.work)
                time_network(table, network, a.runtimes.split(","), threads, batch, a.seconds)
    if a.out is not None and ACCURACY.exists():
        latency_chart.main(["--latency", str(a.out), "--out", str(a.out.parent)])


if __name__ == "__main__":
    main()
