"""Cost of training and evaluation at several widths, as ratios to the float network.

    python tests/benchmarks/bench_training.py [--out training.csv] [--repeats 7] [--threads 2]

Joint step at 8/4/2/1 bits against four float steps; evaluation of 8 truncated widths against 8
float evaluations; peak memory of the joint step against the float step, each in a process of its
own; time of the imports and of --help. The two sides of a ratio are timed in turn, and medians are
compared, so that other work on the machine falls on both; the allocator keeps its memory
(`measuring.py`), but where memory is measured. Seconds of processor time serve as a second opinion.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Table, Took, alternately, fresh_memory, keep_memory

from tq_lightning.callbacks.width_metrics import evaluate_batch
from tq_lightning.models import create_model
from tq_lightning.quant.calibration import calibrate_norms
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.prepare import prepare
from tq_lightning.training.joint import joint_loss

WIDTHS = (8, 4, 2, 1)
BATCHES = 2  # of an evaluation
# model, input size, batch of a training step, batch of an evaluation
CASES = [("resnet20_cifar", 32, 128, 256), ("resnet50", 224, 8, 32)]


def build(
    name: str, size: int, batch: int, prepared: bool
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    if prepared:
        prepare(model, widths=WIDTHS, verbose=False)
    model.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    return model, images, torch.randint(0, 10, (batch,))


def train_step(
    model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor, joint: bool
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        if joint:
            loss, _ = joint_loss(
                model, images, WIDTHS, lambda bits, out, wider: F.cross_entropy(out, target)
            )
        else:
            loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()

    return step


def ratio(one: Took, other: Took, aim: str) -> tuple[float, str, str, str]:
    """Return the columns of a row after the case: ratio, unit, aim, ratio by processor time."""
    return one.clock / other.clock, "x", aim, f"by processor time {one.busy / other.busy:.3f}"


def joint_ratio(name: str, size: int, batch: int, repeats: int) -> tuple[float, str, str, str]:
    """A joint step over K float steps."""
    plain = train_step(*build(name, size, batch, False), False)
    joint = train_step(*build(name, size, batch, True), True)

    def float_steps() -> None:
        for _ in WIDTHS:
            plain()

    took = alternately(repeats, float=float_steps, joint=joint)
    return ratio(took["joint"], took["float"], "<= 1.1")


def evaluation_ratio(name: str, size: int, batch: int, repeats: int) -> tuple[float, str, str, str]:
    """Evaluation of 8 truncated widths over 8 float evaluations."""
    reference, images, _ = build(name, size, batch, False)
    model, _, _ = build(name, size, batch, True)
    calibrate_norms(model, [images])
    passes = [(bits, "truncate") for bits in range(8, 0, -1)]
    reference.eval()
    model.eval()

    def evaluate_float() -> None:
        with torch.no_grad():
            for _ in range(BATCHES * len(passes)):
                reference(images)

    def evaluate_widths() -> None:
        with fused_weights(
            model
        ):  # as the callback does: weights are coded once an evaluation, not once a batch
            for _ in range(BATCHES):
                evaluate_batch(model, images, passes)

    took = alternately(repeats, float=evaluate_float, widths=evaluate_widths)
    return ratio(took["widths"], took["float"], "<= 1.05")


def peak_bytes(name: str, size: int, batch: int, joint: bool, threads: int) -> int:
    """Measure the peak resident memory of three steps above the built model, in a new process."""
    ask = json.dumps([name, size, batch, joint, threads])
    argv = [sys.executable, __file__, "--memory", ask]
    done = subprocess.run(argv, env=fresh_memory(), capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def memory(ask: str) -> None:
    name, size, batch, joint, threads = json.loads(ask)
    torch.set_num_threads(threads)
    step = train_step(*build(name, size, batch, joint), joint)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def seconds_of(command: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default=",".join(case[0] for case in CASES))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory:
        memory(args.memory)
        return 0
    keep_memory()
    torch.set_num_threads(args.threads)
    table = Table()
    for name, size, batch, eval_batch in CASES:
        if name not in args.models.split(","):
            continue
        what = f"{name} batch {batch}: joint step / {len(WIDTHS)} float steps"
        table.add(what, *joint_ratio(name, size, batch, args.repeats))
        what = (
            f"{name}, {BATCHES} batches of {eval_batch}: 8 truncated widths / 8 float evaluations"
        )
        table.add(what, *evaluation_ratio(name, size, eval_batch, max(3, args.repeats // 2)))
        one, all_widths = (
            peak_bytes(name, size, batch, joint, args.threads) for joint in (False, True)
        )
        table.add(
            f"{name} batch {batch}: peak memory, joint / float step",
            all_widths / one,
            "x",
            "<= 1.15",
        )
    python = [sys.executable, "-c"]
    table.add("import tq_lightning", seconds_of([*python, "import tq_lightning"], 3), "s")
    table.add(
        "python -m tq_lightning --help",
        seconds_of([sys.executable, "-m", "tq_lightning", "--help"], 3),
        "s",
        "<= 2",
    )
    table.add(
        "import prepare (torch)", seconds_of([*python, "from tq_lightning import prepare"], 3), "s"
    )
    table.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
