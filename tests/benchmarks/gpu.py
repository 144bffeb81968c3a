"""Joint steps relative to float steps on a GPU: eager, compiled and as CUDA graphs, in bfloat16.

    python tests/benchmarks/gpu.py [--out results/benchmarks/gpu.csv] [--repeats 5]

`make gpu` runs it after the tests marked gpu. The data is on the device. A ratio is the median over
pairs that are timed alternately, with a device synchronization before and after each. The note has
the name of the GPU and the milliseconds of a joint step.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Table, alternately, paired

from tq_lightning.models import create_model
from tq_lightning.quant.prepare import prepare
from tq_lightning.training.joint import joint_loss

WIDTHS = (8, 4, 2, 1)
# model, input size in pixels, batch, modes: those that compile within 10 minutes in all
CASES = [
    ("resnet20_cifar", 32, 128, ["eager", "compiled", "CUDA graphs"]),
    ("resnet20_cifar", 32, 1024, ["eager", "compiled"]),
    ("resnet50", 224, 64, ["eager", "compiled"]),
    ("vit_small_patch16_224", 224, 64, ["eager", "compiled"]),
]
AIMS = {"eager": "<= 1.10", "compiled": "<= 1.05", "CUDA graphs": "<= 1.05"}
MODES = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}


def steps(
    name: str, size: int, batch: int, device: torch.device, mode: str | None
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return (len(WIDTHS) float steps, one joint step); `mode` is that of torch.compile or None."""
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 10, (batch,), device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def make(joint: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = create_model(name, num_classes=10)
        if joint:
            prepare(model, widths=WIDTHS, verbose=False)
            model.fused_model = None  # keeps the weights between steps, like a TQModule
        model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        network = torch.compile(model, mode=mode) if mode else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                if joint:
                    loss, _ = joint_loss(
                        network, images, WIDTHS, lambda b, out, w: F.cross_entropy(out, target)
                    )
                else:
                    loss = F.cross_entropy(network(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    float_step, joint_step = make(False), make(True)

    def float_steps() -> None:
        for _ in WIDTHS:
            float_step()
        wait()

    def joint_steps() -> None:
        joint_step()
        wait()

    for _ in range(3):  # warm-up: compilation, choice of algorithms, the allocator
        float_steps()
        joint_steps()
    return float_steps, joint_steps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cpu runs a trial of the script")
    parser.add_argument("--cases", help="name:size:batch, separated by commas")
    parser.add_argument("--modes", help=f"for every case: {', '.join(MODES)}")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device found; this benchmark needs one", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cases = CASES
    if args.cases:
        rows = [case.split(":") for case in args.cases.split(",")]
        cases = [(name, int(size), int(batch), list(MODES)) for name, size, batch in rows]
    table = Table()
    for name, size, batch, modes in cases:
        for mode in args.modes.split(",") if args.modes else modes:
            torch._dynamo.reset()
            float_steps, joint_steps = steps(name, size, batch, device, MODES[mode])
            ratio = paired(args.repeats, float_steps, joint_steps)
            seconds = alternately(args.repeats, joint=joint_steps)["joint"]
            what = f"{name} batch {batch}, bf16, {mode}: joint step / {len(WIDTHS)} float steps"
            note = f"{card}; {1000 * seconds.clock:.1f} ms"
            table.add(what, ratio.clock, "x", AIMS[mode], note)
            # write now, so that a failure of a later case does not lose this row
            table.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
