"""Resume a trial: the folders of its attempts, and a copy of the run of an earlier attempt."""

import contextlib
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write
from tq_lightning.records import NAME, mark_superseded
from tq_lightning.training.run_folder import LAST, has_finished

if TYPE_CHECKING:
    import optuna


class EarlierRun(NamedTuple):
    """A copy of the run of an earlier attempt.

    Attributes:
        trial: the earlier attempt.
        record: record.json of the copy if that run finished, else None.
        checkpoint: the checkpoint to resume, None if the run finished.
        step: its global step.
    """

    trial: "optuna.trial.FrozenTrial"
    record: Path | None
    checkpoint: Path | None
    step: int


def attempt_folder(trials: Path, trial: "optuna.trial.FrozenTrial") -> Path:
    """Return a folder below `trials` for one attempt, unique over all machines."""
    attempt = trial.user_attrs["attempt"]
    middle = f"retry{attempt}-" if attempt else ""
    return trials / f"{trial.user_attrs['point']:04d}-{middle}{secrets.token_hex(3)}"


def copy_earlier_run(
    study: "optuna.Study", trial: "optuna.trial.FrozenTrial", folder: Path
) -> EarlierRun | None:
    """Copy the newest run of the earlier attempts at a trial's point into `folder`.

    A finished run comes first: its worker died before it stored the result. The originals are
    marked superseded, so that the trial counts once.

    Returns:
        The copy; None if no earlier attempt reached a checkpoint, or if its folder is on another
        machine.
    """
    from tq_lightning.training.checkpoint_progress import read_progress

    earlier = _earlier_runs(study, trial, folder.parent)
    originals = [run / NAME for run, _ in earlier if _is_finished(run)]
    for run, attempt in earlier:
        step, finished = 0, _is_finished(run)
        try:
            with atomic_write(folder) as part:
                # without W&B's files, because a resumed fit starts its own W&B run
                ignored = shutil.ignore_patterns("wandb", "*.tmp", ".lock")
                shutil.copytree(run, part / run.name, ignore=ignored)
                if not finished:
                    step = read_progress(part / run.name / LAST).step
        except UserError as error:
            print(f"cannot resume {run}: {error}", file=sys.stderr, flush=True)
            continue
        for original in originals:
            with contextlib.suppress(UserError):
                mark_superseded(original)
        copy = folder / run.name
        if finished:
            return EarlierRun(attempt, copy / NAME, None, step)
        return EarlierRun(attempt, None, copy / LAST, step)
    return None


def _earlier_runs(
    study: "optuna.Study", trial: "optuna.trial.FrozenTrial", trials: Path
) -> list[tuple[Path, "optuna.trial.FrozenTrial"]]:
    """Return (run, attempt) of the earlier attempts: finished runs first, then the latest."""
    by_number = {t.number: t for t in study.get_trials(deepcopy=False)}
    found: list[tuple[Path, optuna.trial.FrozenTrial]] = []
    while "retry_of" in trial.user_attrs:
        trial = by_number[trial.user_attrs["retry_of"]]
        if "run_dir" not in trial.user_attrs:  # its worker died before the trial began
            continue
        folder = trials / Path(trial.user_attrs["run_dir"]).name
        checkpoints = sorted(folder.glob(f"*/{LAST}"), key=lambda p: p.stat().st_mtime)
        runs = [path.parents[1] for path in reversed(checkpoints)]
        finished = [p.parent for p in folder.glob(f"*/{NAME}") if _is_finished(p.parent)]
        found += [(run, trial) for run in dict.fromkeys([*finished, *runs])]
    return sorted(found, key=lambda pair: not _is_finished(pair[0]))


def _is_finished(run: Path) -> bool:
    """Return True for a finished run; one with a damaged record is trained again."""
    try:
        return has_finished(run)
    except UserError:
        return False
