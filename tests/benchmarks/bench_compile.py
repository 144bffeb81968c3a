"""Time of an eager joint step over that of a compiled one (torch.compile), after compilation.

    python tests/benchmarks/bench_compile.py [--out compile.csv] [--repeats 15] [--threads 2]

An eager step requests more memory, so the ratio depends on how the C library returns freed memory
to the system. Rows are measured with its defaults, and with `measuring.KEPT`. A ratio is the median
over pairs that are timed in turn. The note has the ratio of processor time.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from bench_training import build, train_step
from measuring import KEPT, Table, paired

NAME, SIZE, BATCH = "resnet20_cifar", 32, 128
# memory format, aim with the defaults of the C library. oneDNN is already fastest with
# channels_last, so the remaining gain is smaller.
LAYOUTS = [("contiguous_format", ">= 1.2"), ("channels_last", "")]
MEMORY: dict[str, dict[str, str]] = {"default": {}, "kept": KEPT}


def measure(layout: str, repeats: int, threads: int) -> None:
    """Print the ratios of wall time and of processor time."""
    torch.set_num_threads(threads)
    eager = train_step(*build(NAME, SIZE, BATCH, True, layout), True)
    model, images, target = build(NAME, SIZE, BATCH, True, layout)
    compiled = train_step(torch.compile(model), images, target, True)  # type: ignore[arg-type]
    compiled()
    print(*paired(repeats, compiled, eager))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layout", help="measure in this process, print the ratios, write nothing")
    args = parser.parse_args(argv)
    if args.layout:
        measure(args.layout, args.repeats, args.threads)
        return 0
    table = Table()
    for memory, variables in MEMORY.items():
        for layout, aim in LAYOUTS:
            command = [sys.executable, __file__, "--layout", layout]
            command += ["--repeats", str(args.repeats), "--threads", str(args.threads)]
            env = {key: value for key, value in os.environ.items() if key not in KEPT}
            done = subprocess.run(
                command, env={**env, **variables}, stdout=subprocess.PIPE, text=True, check=True
            )
            clock, busy = map(float, done.stdout.split()[-2:])
            table.add(
                f"{NAME} batch {BATCH}, {layout}, memory {memory}: joint step, eager / compiled",
                clock,
                "x",
                aim if memory == "default" else "",
                f"by processor time {busy:.3f}",
            )
    table.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
