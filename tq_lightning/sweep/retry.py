"""Where a trial runs, and where a retry goes on: with the run that an earlier attempt of its point has left.

Each attempt has a folder of its own, and a retry copies the run it goes on with into its own. The worker that the trial was
taken from may still be alive, cut off or suspended: whatever it writes, it writes into its own folder and spoils nothing.
"""

import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tq_lightning.errors import UserError

if TYPE_CHECKING:
    import optuna

LAST = "checkpoints/last.ckpt"


def new_home(trials: Path, trial: "optuna.trial.FrozenTrial") -> Path:
    """The folder for one attempt, below `trials`: a name that no other trial has, of no study and on no machine."""
    attempt = trial.user_attrs["attempt"]
    middle = f"retry{attempt}-" if attempt else ""
    return trials / f"{trial.user_attrs['point']:04d}-{middle}{secrets.token_hex(3)}"


def go_on(study: "optuna.Study", trial: "optuna.trial.FrozenTrial", home: Path) -> tuple[Path, int] | None:
    """Copy the newest run of the earlier attempts at a trial's point into `home`, which doesn't exist yet.

    Returns the copy's checkpoint and its step; None where the trial has to begin at the beginning: no earlier attempt came to
    a checkpoint, or its folder is on another machine.
    """
    from tq_lightning.training.going_on import checkpoint_step  # torch, Lightning: the fit itself is about to need them

    for path in _checkpoints(study, trial, home.parent):
        part = home.with_name(f"{home.name}.part")
        run = path.parents[1]
        try:
            # W&B's files stay: the fit that goes on makes a W&B run of its own
            shutil.copytree(run, part / run.name, ignore=shutil.ignore_patterns("wandb", "*.tmp"))
            step = checkpoint_step(part / run.name / LAST)
        except (OSError, shutil.Error, UserError) as error:
            print(f"can't go on from {path}: {error}", file=sys.stderr, flush=True)
            shutil.rmtree(part, ignore_errors=True)
            continue
        part.rename(home)  # whole or not at all: a worker that dies in the middle leaves nothing to go on from
        return home / run.name / LAST, step
    return None


def _checkpoints(study: "optuna.Study", trial: "optuna.trial.FrozenTrial", trials: Path) -> list[Path]:
    """The checkpoints of the earlier attempts, those of the last one first."""
    by_number = {t.number: t for t in study.get_trials(deepcopy=False)}
    found: list[Path] = []
    while "retry_of" in trial.user_attrs:
        trial = by_number[trial.user_attrs["retry_of"]]
        if "run_dir" in trial.user_attrs:  # else its worker died before it began
            there = (trials / Path(trial.user_attrs["run_dir"]).name).glob(f"*/{LAST}")
            found += sorted(there, key=lambda path: path.stat().st_mtime, reverse=True)
    return found
