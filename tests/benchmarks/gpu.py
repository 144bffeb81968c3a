"""Joint steps relative to float steps on a GPU, in bfloat16.

Modes: eager, compiled (torch.compile), CUDA graphs (its mode reduce-overhead), recorded (forward
and backward of a step are one CUDA graph, as with `model.cuda_graph`), and compiled + recorded.

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
from tq_lightning.training.joint import (
    JointGradients,
    joint_gradients,
    joint_loss,
    loss_with_gradients,
)
from tq_lightning.training.step_graph import WARM_UP_STEPS, StepGraphs

WIDTHS = (8, 4, 2, 1)
# model, input size in pixels, batch, modes: those that compile within 10 minutes in all
SMALL = ["eager", "compiled", "CUDA graphs", "recorded", "compiled + recorded"]
LARGE = ["eager", "recorded", "compiled"]
CASES = [
    ("resnet20_cifar", 32, 128, SMALL),
    ("resnet20_cifar", 32, 1024, SMALL),
    ("resnet50", 224, 64, LARGE),
    ("vit_small_patch16_224", 224, 64, LARGE),
]
# mode -> (mode of torch.compile or None, whether steps are recorded)
MODES: dict[str, tuple[str | None, bool]] = {
    "eager": (None, False),
    "compiled": ("default", False),
    "CUDA graphs": ("reduce-overhead", False),
    "recorded": (None, True),
    "compiled + recorded": ("default", True),
}
AIMS = {"eager": "<= 1.10"}  # of the others <= 1.05


def steps(
    name: str, size: int, batch: int, device: torch.device, mode: str | None, recorded: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return (len(WIDTHS) float steps, one joint step) in a mode of `MODES`."""
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

        graphs = StepGraphs() if recorded else None

        def gradients(tensors: tuple[torch.Tensor, torch.Tensor]) -> JointGradients:
            images, target = tensors
            if joint:
                return joint_gradients(
                    network, images, WIDTHS, lambda b, out, w: F.cross_entropy(out, target)
                )
            parameters = list(model.parameters())
            loss = F.cross_entropy(network(images), target)
            grads = list(torch.autograd.grad(loss, parameters))
            return JointGradients(loss.detach()[None], loss.isfinite(), grads, parameters)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                if graphs is not None:
                    found = graphs(model, None, gradients, (images, target))
                    loss, _ = loss_with_gradients(model, found, WIDTHS if joint else (None,))
                elif joint:
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

    # compilation, choice of algorithms, the allocator, recording
    for _ in range(WARM_UP_STEPS + 1):
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
            float_steps, joint_steps = steps(name, size, batch, device, *MODES[mode])
            ratio = paired(args.repeats, float_steps, joint_steps)
            seconds = alternately(args.repeats, joint=joint_steps)["joint"]
            what = f"{name} batch {batch}, bf16, {mode}: joint step / {len(WIDTHS)} float steps"
            note = f"{card}; {1000 * seconds.clock:.1f} ms"
            table.add(what, ratio.clock, "x", AIMS.get(mode, "<= 1.05"), note)
            # write now, so that a failure of a later case does not lose this row
            table.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
