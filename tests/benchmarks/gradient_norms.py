"""Gradient norms of the passes of a joint step, by straight-through estimator.

    python tests/benchmarks/gradient_norms.py --data-root DATA --weights resnet20_cifar10_fp32.th

The network is a ResNet-20 with the given float weights, before any quantized step. For each
estimator and width, prints the norm of the gradient of the quantized weights, divided by that of
the 8-bit pass: the median over batches of 128 training images.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from tq_lightning import bit_width
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.training.module import TQModule

WIDTHS, STES = (8, 4, 2, 1), ("scaled", "identity", "slope")
SETTINGS = {
    "tanh, mean (the paper)": {},
    "learned range": {"normalizer": "learned", "level": "centre", "scale": "span"},
}


def gradient_norms(module: TQModule, batches: list) -> dict[int, float]:
    """Return {width: median gradient norm of the quantized weights}."""
    weights = [weight.original for weight in weight_quantizers(module.model)]
    norms: dict[int, list[float]] = {bits: [] for bits in WIDTHS}
    for bits, found in norms.items():
        for images, labels in batches:
            module.zero_grad()
            with bit_width(module, bits):
                F.cross_entropy(module(images), labels).backward()
            found.append(get_total_norm([weight.grad for weight in weights]).item())
    return {bits: statistics.median(found) for bits, found in norms.items()}


def main() -> None:
    """Print one line per setting and estimator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--weights", required=True, help="float weights of the ResNet-20")
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    data = TQDataModule(name="cifar10", root=args.data_root, batch_size=128, workers=0)
    data.setup("fit")
    batches = list(data.calibration_batches(args.batches))
    start = {"name": "resnet20_cifar", "num_classes": 10, "checkpoint_path": args.weights}
    for setting, choices in SETTINGS.items():
        for ste in STES:
            module = TQModule(**start, ste=ste, **choices)
            module.configure_model()
            norms = gradient_norms(module.train(), batches)
            ratios = ", ".join(f"{norms[b] / norms[8]:.2f} at {b}" for b in WIDTHS[1:])
            print(f"{setting}, {ste}: {ratios} bits", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
