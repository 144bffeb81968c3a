"""Throughput of the loader in augmented images: CIFAR size, random crop, horizontal flip.

    python tests/benchmarks/bench_loader.py [--out loader.csv] [--device cpu] \\
        [--seconds 5] [--batch-size 128] [--threads 2]

The data are 20,000 random images of 32x32 in memory, like CIFAR-10. As in training, batches are
read from memory, moved to the device, cropped, flipped and normalized. The aim is 15,000 images per
second on 2 cores. Images per second of processor time do not depend on other load.
"""

import argparse
import time
from pathlib import Path

import torch
from measuring import Table

from tq_lightning.data.datamodule import TQDataModule

AIM = 15_000
CASES = {"crop+flip": {}, "crop+flip+erasing": {"reprob": 0.25}, "crop+flip+mixup": {"mixup": 0.2}}


def measure(
    keys: dict[str, float], batch_size: int, seconds: float, device: str
) -> tuple[float, float]:
    """Measure images per second of wall and processor time, over all epochs except the first."""
    module = TQDataModule("synthetic", samples=20_000, batch_size=batch_size, seed=0, **keys)
    loader = module.train_dataloader()

    def epoch(number: int) -> int:
        loader.set_epoch(number)
        images = 0
        for pixels, labels, draw in loader:
            draw = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in draw.items()}
            out, _ = module.on_after_batch_transfer((pixels.to(device), labels.to(device), draw), 0)
            images += len(out)
        if device != "cpu":
            torch.cuda.synchronize()
        return images

    epoch(0)
    start, busy, images, number = time.perf_counter(), time.process_time(), 0, 0
    while time.perf_counter() - start < seconds:
        number += 1
        images += epoch(number)
    return images / (time.perf_counter() - start), images / (time.process_time() - busy)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each case is measured")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    table = Table()
    for name, keys in CASES.items():
        rate, per_core = measure(keys, args.batch_size, args.seconds, args.device)
        note = (
            f"{per_core:,.0f} per second of processor time; batch {args.batch_size}, "
            f"{args.threads} threads, {args.device}"
        )
        table.add(
            f"loader alone, {name}",
            rate,
            "images/s",
            f">= {AIM}" if name == "crop+flip" else "",
            note,
        )
    table.write(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
