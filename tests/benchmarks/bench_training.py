"""Cost of training and evaluation at several widths, as ratios to the float network.

    python tests/benchmarks/bench_training.py [--out training.csv] [--repeats 7] [--threads 2]
        [--models resnet20_cifar] [--parts joint,evaluation,memory,launch,start]

- joint: a joint step at 8/4/2/1 bits against four float steps
- evaluation: 8 truncated widths against 8 float evaluations
- memory: peak bytes of the joint step's tensors, without the weights of one width, against those of
  the float step
- launch: a joint step against four float steps of 40 convolutions of 4 channels, where Python
  overhead dominates, as for a small network on a GPU
- start: time of the imports and of --help

A ratio is the median over pairs that are timed in turn, so that other load affects both sides. The
C library keeps freed memory (`measuring.py`). The note has the ratio of processor time. Bytes are
counted, so they are the same on every machine.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Calls, Table, keep_memory, paired

from tq_lightning.callbacks.width_metrics import evaluate_batch
from tq_lightning.models import create_model
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.norm_calibration import calibrate_norms
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.training.joint import joint_loss

WIDTHS = (8, 4, 2, 1)
# model, input size, batch of a training step, batch of an evaluation
CASES = [("resnet20_cifar", 32, 128, 256), ("resnet50", 224, 8, 64)]
PARTS = ("joint", "evaluation", "memory", "launch", "start")
Columns = tuple[float, str, str, str]  # of a row after the case: ratio, unit, aim, note


def build(
    name: str, size: int, batch: int, prepared: bool, layout: str = "channels_last"
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    if prepared:
        prepare(model, widths=WIDTHS, verbose=False)
    memory_format = getattr(torch, layout)
    model.to(memory_format=memory_format)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=memory_format)
    return model, images, torch.randint(0, 10, (batch,))


def train_step(
    model: torch.nn.Module,
    images: torch.Tensor,
    target: torch.Tensor,
    joint: bool,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], None]:
    """Return a step in the order of Lightning, which frees gradients after the forward pass.

    `TQModule` frees those of a joint step as soon as the optimizer has used them.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def step() -> None:
        if joint:
            loss, _ = joint_loss(
                model, images, WIDTHS, lambda bits, out, wider: F.cross_entropy(out, target)
            )
        else:
            loss = F.cross_entropy(model(images), target)
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if joint:
            optimizer.zero_grad()

    return step


def ratio(repeats: int, base: Calls, other: Calls, aim: str) -> Columns:
    took = paired(repeats, base, other)
    return took.clock, "x", aim, f"by processor time {took.busy:.3f}"


def joint_ratio(name: str, size: int, batch: int, repeats: int) -> Columns:
    """Measure a joint step over K widths against K float steps."""
    plain = train_step(*build(name, size, batch, False), False)
    joint = train_step(*build(name, size, batch, True), True)

    def float_steps() -> None:
        for _ in WIDTHS:
            plain()

    return ratio(repeats, float_steps, joint, "<= 1.03")


def launch_ratio(repeats: int) -> Columns:
    """Measure a joint step against float steps of a network with negligible arithmetic."""

    def step_of(joint: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        blocks: list[torch.nn.Module] = []
        for _ in range(40):
            conv = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
            blocks += [conv, torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
        head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10))
        model = torch.nn.Sequential(*blocks, *head)
        if joint:
            prepare(model, widths=WIDTHS, verbose=False)
            model.__dict__["fused_model"] = None  # kept between the steps, as `TQModule` does
        # one call for all parameters, the default on a GPU
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        return train_step(model, torch.randn(1, 4, 4, 4), torch.tensor([1]), joint, optimizer)

    plain, joint = step_of(False), step_of(True)

    def float_steps() -> None:
        for _ in WIDTHS:
            plain()

    for _ in range(3):
        float_steps()
        joint()
    return ratio(5 * repeats, float_steps, joint, "")


def evaluation_ratio(name: str, size: int, batch: int, repeats: int) -> Columns:
    """Measure the evaluation of 8 truncated widths against 8 float evaluations, of one batch.

    A float pass is timed next to the pass of each width. The first width includes the time to
    normalize the weights, which an evaluation of many batches needs once too.
    """
    reference, images, _ = build(name, size, batch, False)
    model, _, _ = build(name, size, batch, True)
    calibrate_norms(model, [images])
    reference.eval()
    model.eval()
    widths = range(8, 0, -1)

    def evaluate_float() -> None:
        with torch.no_grad():
            reference(images)

    with fused_weights(model) as fused:  # as the callback does, for all batches

        def evaluate_width(bits: int) -> None:
            if bits == widths[0]:
                fused.end()  # as after an evaluation: the weights are normalized again
            evaluate_batch(model, images, [(bits, "truncate")])

        passes = [partial(evaluate_width, bits) for bits in widths]
        return ratio(repeats, [evaluate_float] * len(widths), passes, "<= 1.02")


def peak_bytes(name: str, size: int, batch: int, joint: bool) -> int:
    """Peak bytes of the tensors of a step, parameters and optimizer state included.

    This counts the memory of PyTorch's allocator, not of the process, because the memory that the C
    library keeps depends on the order of requests.
    """
    model, images, target = build(name, size, batch, joint)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step = train_step(model, images, target, joint, optimizer)
    step()
    state = [v for values in optimizer.state.values() for v in values.values()]
    grads = [p.grad for p in model.parameters()]
    tensors = [*model.parameters(), *model.buffers(), *grads, *state]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}
    live = peak = sum(storage.nbytes() for storage in held.values())
    del tensors, grads, held
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def memory_ratio(name: str, size: int, batch: int) -> Columns:
    """Peak of the joint step, without the quantized weights of one width, over the float step."""
    one, joint = (peak_bytes(name, size, batch, prepared) for prepared in (False, True))
    weights = sum(4 * w.original.numel() for w in weight_quantizers(build(name, size, 1, True)[0]))
    note = f"float {one / 2**20:.0f} MiB, joint {joint / 2**20:.0f}, weights {weights / 2**20:.0f}"
    return (joint - weights) / one, "x", "<= 1.05", note


def seconds_of(command: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def add_start_times(table: Table) -> None:
    python = [sys.executable, "-c"]
    table.add("import tq_lightning", seconds_of([*python, "import tq_lightning"], 3), "s")
    command = [sys.executable, "-m", "tq_lightning", "--help"]
    table.add("python -m tq_lightning --help", seconds_of(command, 3), "s", "<= 2")
    command = [*python, "from tq_lightning import prepare"]
    table.add("import prepare (torch)", seconds_of(command, 3), "s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default=",".join(case[0] for case in CASES))
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args(argv)
    keep_memory()
    torch.set_num_threads(args.threads)
    table, parts, few = Table(), args.parts.split(","), max(3, args.repeats // 2)
    for name, size, batch, eval_batch in CASES:
        if name not in args.models.split(","):
            continue
        step = f"{name} batch {batch}"
        if "joint" in parts:
            row = joint_ratio(name, size, batch, args.repeats)
            table.add(f"{step}: joint step / {len(WIDTHS)} float steps", *row)
        if "evaluation" in parts:
            row = evaluation_ratio(name, size, eval_batch, few)
            what = f"batch of {eval_batch}: 8 truncated widths / 8 float evaluations"
            table.add(f"{name}, {what}", *row)
        if "memory" in parts:
            row = memory_ratio(name, size, batch)
            table.add(f"{step}: peak bytes, joint without one width's weights / float step", *row)
    if "launch" in parts:
        row = launch_ratio(args.repeats)
        table.add(f"40 convolutions of 4 channels: joint step / {len(WIDTHS)} float steps", *row)
    if "start" in parts:
        add_start_times(table)
    table.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
