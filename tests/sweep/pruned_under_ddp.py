"""Run as a script: one trial with two processes, pruned after its first epoch."""

import sys
from pathlib import Path

from tq_lightning.cli import run_fit
from tq_lightning.sweep.trial import run_trial

if __name__ == "__main__":
    folder, *argv = sys.argv[1:]
    steps = []
    result = run_trial(
        run_fit,
        argv,
        Path(folder),
        ["val/acc1_truncate_mean"],
        lambda step, value: steps.append(step) or True,
    )
    print(f"{result.state} after {steps}: {result.record}")
