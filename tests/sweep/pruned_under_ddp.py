"""Run as a module: one trial with two processes, pruned after its first epoch.

Lightning starts rank 1 as `-m pruned_under_ddp fit ...`.
"""

import sys
from pathlib import Path

from tq_lightning.cli import main, run_fit
from tq_lightning.sweep.trial import run_trial

if __name__ == "__main__":
    if sys.argv[1] == "fit":
        sys.exit(main(sys.argv[1:]))
    folder, *argv = sys.argv[1:]
    steps = []
    ending = run_trial(
        run_fit,
        argv,
        Path(folder),
        ["val/acc1_truncate_mean"],
        lambda step, value: steps.append(step) or True,
    )
    print(f"{ending.state} after {steps}: {ending.record}")
