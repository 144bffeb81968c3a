"""Comparison with other quantization libraries: training step, width switch, bytes, latency.

    pip install -c constraints.txt -e '.[peers]'
    python tests/benchmarks/bench_peers.py [--out peers.csv] [--repeats 7] [--threads 2]

Brevitas and optimum-quanto quantize to one width at a time and do not truncate, so the closest
features are compared. For Brevitas, it is a step of quantization-aware training of ResNet-20 with
quantized weights, float activations and the same layers in float. For optimum-quanto, it is a
ResNet-50 with weights stored at 8, 4 or 2 bits, with its own range estimation, packing and kernels.

Accuracy is not compared, because weights are random. Timed calls alternate, and medians are
compared. Libraries that are not installed are skipped with a note.
"""

import argparse
import copy
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Table, alternately, keep_memory
from torch import nn

from tq_lightning import bit_width, load_packed, prepare, save_packed
from tq_lightning.export.packed.weight import packed_weights
from tq_lightning.models import create_model
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.training.joint import joint_loss

BATCH, WIDTHS = 128, (8, 4, 2)
Row = tuple[str, float, str]


def with_brevitas(model: nn.Module, bits: int) -> nn.Module:
    """Build a ResNet-20 with QuantConv2d of Brevitas, float activations and a float stem."""
    import brevitas.nn as qnn

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and name != "conv1":
            parent, _, child = name.rpartition(".")
            new = qnn.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                3,
                layer.stride,
                layer.padding,
                bias=False,
                weight_bit_width=bits,
            )
            new.weight.data.copy_(layer.weight.data)
            setattr(model.get_submodule(parent), child, new)
    return model


def training(repeats: int) -> Iterator[Row]:
    """Compare ResNet-20 steps at 8, 4, 2 and 1 bits with 4 float steps: joint, and Brevitas.

    Brevitas' own weights of one bit are binary, which is another quantizer: its four are 8, 4, 3
    and 2 bits.
    """
    torch.manual_seed(0)
    plain = create_model("resnet20_cifar", num_classes=10)
    ours = copy.deepcopy(plain)
    prepare(ours, widths=(8, 4, 2, 1), verbose=False)
    images, target = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    images = images.contiguous(memory_format=torch.channels_last)

    def joint() -> None:
        ours.zero_grad()
        joint_loss(
            ours, images, (8, 4, 2, 1), lambda bits, out, wider: F.cross_entropy(out, target)
        )[0].backward()

    def one_by_one(models: list[nn.Module]) -> Callable[[], None]:
        def run() -> None:
            for model in models:
                model.zero_grad()
                F.cross_entropy(model(images), target).backward()

        return run

    peers = {"float": [plain] * 4}
    if importlib.util.find_spec("brevitas"):
        peers["brevitas"] = [with_brevitas(copy.deepcopy(plain), bits) for bits in (8, 4, 3, 2)]
    for model in (ours, *itertools.chain(*peers.values())):
        model.train().to(memory_format=torch.channels_last)
    took = alternately(
        repeats, tq_lightning=joint, **{name: one_by_one(models) for name, models in peers.items()}
    )
    for name in [name for name in took if name != "float"]:
        yield (
            f"ResNet-20, batch {BATCH}, 4 widths / 4 float steps: {name}",
            took[name].clock / took["float"].clock,
            "x",
        )


def quanto_model(plain: nn.Module, bits: int) -> nn.Module:
    """Quantize the float network with optimum-quanto, with a float stem and frozen weights."""
    from optimum import quanto

    model = copy.deepcopy(plain)
    quanto.quantize(
        model, weights={8: quanto.qint8, 4: quanto.qint4, 2: quanto.qint2}[bits], exclude=["conv1"]
    )
    quanto.freeze(model)
    return model


def serving(folder: Path, repeats: int) -> Iterator[Row]:
    """Compare ResNet-50: bytes on disk, seconds to switch the width, latency relative to float."""
    from safetensors.torch import save_file

    plain = create_model("resnet50").eval()
    prepared = copy.deepcopy(plain)
    prepare(prepared, skip=("first",), verbose=False)
    for norm in per_width_norms(prepared):
        norm.calibrated.fill_(True)
    packed = folder / "packed.safetensors"
    save_packed(prepared.eval(), packed)
    del prepared
    save_file(plain.state_dict(), folder / "float.safetensors")
    yield "ResNet-50, what serves 8, 4 and 2 bits: tq_lightning", packed.stat().st_size, "bytes"
    yield (
        "ResNet-50, what serves 8, 4 and 2 bits: float",
        (folder / "float.safetensors").stat().st_size,
        "bytes",
    )
    ours = load_packed(packed)
    pairs = [(w.module, w.tensor) for w in packed_weights(ours)]
    assert pairs
    turn = {"tq_lightning": 0, "optimum-quanto": 0}

    def switch() -> None:
        turn["tq_lightning"] += 1
        with torch.no_grad(), bit_width(ours, WIDTHS[turn["tq_lightning"] % 3], "truncate"):
            for module, tensor in pairs:
                getattr(module, tensor)

    def requantize() -> None:
        turn["optimum-quanto"] += 1
        quanto_model(plain, WIDTHS[turn["optimum-quanto"] % 3])

    peer = (
        importlib.util.find_spec("optimum") is not None
        and importlib.util.find_spec("optimum.quanto") is not None
    )
    if peer:
        total = 0
        for bits in WIDTHS:
            file = folder / f"quanto{bits}.safetensors"
            save_file(
                {k: v.contiguous() for k, v in quanto_model(plain, bits).state_dict().items()}, file
            )
            total += file.stat().st_size
        yield "ResNet-50, what serves 8, 4 and 2 bits: optimum-quanto (three files)", total, "bytes"
    took = alternately(7, tq_lightning=switch, **({"optimum-quanto": requantize} if peer else {}))
    for name, call in took.items():
        yield f"ResNet-50, to another width in memory: {name}", 1000 * call.clock, "ms"
    image = torch.randn(1, 3, 224, 224)

    def once(model: nn.Module, bits: int | None) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():  # optimum-quanto's 4 and 2 bits fail under inference_mode
                if bits is None:
                    model(image)
                else:
                    with bit_width(model, bits):
                        model(image)

        return run

    for bits in WIDTHS:
        took = alternately(repeats, float=once(plain, None), ours=once(ours, bits))
        yield (
            f"ResNet-50, one image at {bits} bits / float: tq_lightning",
            took["ours"].clock / took["float"].clock,
            "x",
        )
        if peer:  # two runs suffice: without a kernel for the processor an image takes seconds
            took = alternately(
                2, float=once(plain, None), peer=once(quanto_model(plain, bits), None)
            )
            yield (
                f"ResNet-50, one image at {bits} bits / float: optimum-quanto",
                took["peer"].clock / took["float"].clock,
                "x",
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_memory()
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        for part in (training(args.repeats), serving(Path(folder), args.repeats)):
            for row in part:
                table.add(*row)
    for name in ("brevitas", "optimum"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out; pip install -e '.[peers]' brings it")
    table.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
