"""Overhead of the sweep engine per trial, and time until the second in-process trial starts.

    python tests/benchmarks/bench_sweep.py [--out sweep.csv] [--trials 10]

Trials are stand-ins that return at once, so the time between two of them is the overhead of the
engine: storing a result, claiming the next trial, sampling and heartbeats. Two real fits on two
batches of digits follow, timed from the end of the first to the start of the second.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml
from measuring import Table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "sweep")]

from tq_lightning.sweep.config import read_sweep  # noqa: E402
from tq_lightning.sweep.study import Options, make_trial_queue, open_study  # noqa: E402
from tq_lightning.sweep.worker import Worker  # noqa: E402

METRIC = "val/acc1_truncate_mean"
TINY = [
    "--config", str(ROOT / "conf" / "digits.yaml"), "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu",
]  # fmt: skip


def run(
    folder: Path, method: str, url: str, fit, trials: int, arguments=()
) -> list[tuple[float, float]]:
    """Run a sweep of `trials` in this process. Return (start, end) of each call of `fit`."""
    calls = []

    def timed(argv):
        start = time.perf_counter()
        fit(argv)
        calls.append((start, time.perf_counter()))

    parameter = (
        {"values": [i / trials for i in range(trials)]}
        if method == "grid"
        else {"min": 0.0, "max": 1.0}
    )
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump({
        "method": method, "metric": {"name": METRIC, "goal": "maximize"},
        "parameters": {"model.lr": parameter},
        "command": ["python", "-m", "tq_lightning", "fit", *arguments, "${args}"],
    }))  # fmt: skip
    sweep = read_sweep(file)
    options = Options(folder, url, method, {METRIC: "maximize"}, n_trials=trials)
    queue = make_trial_queue(sweep, open_study(sweep, options), options)
    Worker(queue, sweep, [METRIC], folder, timed).run()
    return calls


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--trials", type=int, default=10)
    args = parser.parse_args(argv)
    import stand_in

    from tq_lightning.cli import run_fit

    table = Table()
    for storage in ("sqlite", "journal"):
        for method in ("grid", "bayes"):
            with tempfile.TemporaryDirectory() as name:
                url = (
                    f"sqlite:///{name}/study.db"
                    if storage == "sqlite"
                    else f"journal:{name}/study.journal"
                )
                calls = run(Path(name), method, url, stand_in.fit, args.trials)
            gap = statistics.median(
                after[0] - before[1] for before, after in itertools.pairwise(calls)
            )
            table.add(f"{storage}, {method}: engine beside fit, per trial", gap, "s")
            table.add(f"{storage}, {method}: share of a one-minute trial", 100 * gap / 60, "%")
    with tempfile.TemporaryDirectory() as name:
        calls = run(Path(name), "grid", f"sqlite:///{name}/study.db", run_fit, 2, TINY)
    table.add(
        "second real trial: from the first's end to its fit", calls[1][0] - calls[0][1], "s", "<= 2"
    )
    first, again = (end - start for start, end in calls)
    table.add("fit on two batches of digits, first (imports in it)", first, "s")
    table.add("fit on two batches of digits, second", again, "s")
    table.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
