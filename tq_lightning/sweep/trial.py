"""One trial: a real `fit` with its own directory, and what its record says came of it."""

import contextlib
import gc
import math
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write
from tq_lightning.records import NAME, Record, RecordError, read_any, value_of

Fit = Callable[
    [list[str]], Any
]  # `tq_lightning.cli.run_fit`, or a test's stand-in that writes a record.json the same way


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended. state: complete, pruned, failed, interrupted or lost; values: one per objective where complete."""

    state: str
    values: tuple[float, ...] = ()
    reason: str = ""
    record: str | None = None

    @property
    def broken(self) -> bool:
        """Whether it failed by an error of CUDA's own, after which every later call in the process fails as well.

        Lack of memory is none: its message has no `CUDA error:`.
        """
        return self.state == "failed" and (
            "CUDA error:" in self.reason or "cuDNN error:" in self.reason
        )


def run_trial(
    fit: Fit,
    argv: list[str],
    folder: Path,
    metrics: list[str],
    report: Callable[[int, float], bool] | None,
    checkpoint: Path | None = None,
) -> TrialResult:
    """Run `fit argv` in `folder` and read its record. Raises nothing: a trial may end in any way, and the sweep goes on.

    metrics: the objectives' names, read by `value_of`. report: (step, value) -> whether to prune, for the pruning callback;
    None where nothing prunes. checkpoint: what the fit goes on from, in a run below `folder`; None: it begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    argv = [*argv, f"--trainer.default_root_dir={folder}"]
    if checkpoint is not None:
        argv.append(f"--ckpt_path={checkpoint}")
    pruned = False

    def decide(step: int, value: float) -> bool:
        nonlocal pruned
        assert report is not None
        pruned = pruned or report(step, value)
        return pruned

    if report is not None:
        argv += [
            "--trainer.callbacks+=tq_lightning.sweep.pruning.ReportToStudy",
            f"--trainer.callbacks.monitor={metrics[0]}",
        ]
    failure, interrupted, before = "", False, _records(folder)
    path: Path | None = None
    try:
        with _as_program(argv), _reporting(decide if report is not None else None):
            path = Path(fit(argv)["record"])
    except KeyboardInterrupt:
        interrupted = True
    except SystemExit as error:
        failure = f"fit ended with exit status {error.code}"
    except BaseException as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    if failure:
        _free_memory()
    if path is None:  # fit raised: the record it wrote, if any, says how far it came
        written = [path for path, when in _records(folder).items() if before.get(path) != when]
        path = written[0] if written else None
    record, shown = _read(path), str(path) if path is not None else None
    if interrupted or (record is not None and record.status == "interrupted"):
        return TrialResult("interrupted", reason="stopped by the user", record=shown)
    if failure or record is None:
        return TrialResult(
            "failed", reason=failure or f"fit left no record.json in {folder}", record=shown
        )
    if record.status == "failed":
        return TrialResult("failed", reason=record.reason or "its record says failed", record=shown)
    if pruned:
        return TrialResult("pruned", reason="pruned", record=shown)
    return _judge(record, metrics, shown)


def _read(path: Path | None) -> Record | None:
    try:
        record = read_any(path) if path is not None else None
    except RecordError:
        return None
    return record if isinstance(record, Record) else None


def _records(folder: Path) -> dict[Path, int]:
    """{record.json under a trial's folder: when it was written in ns}; one of an earlier run is none of this trial's."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob(NAME))}


def _judge(record: Record, metrics: list[str], shown: str | None) -> TrialResult:
    """A finished run's values; failed if a metric is missing or any metric of the last epoch is not finite."""
    last = record.last.metrics if record.last is not None else {}
    # accuracies stay finite when the weights are NaN; the losses beside them tell
    for name, value in last.items():
        if value is not None and not math.isfinite(value):
            return TrialResult(
                "failed", reason=f"non-finite: {name} is {value} in the last epoch", record=shown
            )
    values = [value_of(record, name) for name in metrics]
    for name, value in zip(metrics, values, strict=True):
        if value is None:
            return TrialResult(
                "failed",
                reason=f"{name} was never logged; the record has {', '.join(sorted(last))}",
                record=shown,
            )
    return TrialResult(
        "complete", tuple(value for value in values if value is not None), record=shown
    )


@contextlib.contextmanager
def _as_program(argv: list[str]) -> Iterator[None]:
    """Let this process look like `fit argv`: under DDP, Lightning starts the other ranks from sys.argv."""
    before, sys.argv = sys.argv, [sys.argv[0], "fit", *argv]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _reporting(decide: Callable[[int, float], bool] | None) -> Iterator[None]:
    """Set the pruning callback's way to the study, where one is wanted (its module imports Lightning)."""
    if decide is None:
        yield
        return
    from tq_lightning.sweep import pruning

    pruning.report = decide
    try:
        yield
    finally:
        pruning.report = None


def _free_memory() -> None:
    """After a failure: drop what the traceback held, so that one trial's lack of memory is not the next one's."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with contextlib.suppress(
            RuntimeError
        ):  # a broken context (see `Ending.broken`) has no memory to give back
            torch.cuda.empty_cache()


if TYPE_CHECKING:
    import optuna

LAST = "checkpoints/last.ckpt"


def new_home(trials: Path, trial: "optuna.trial.FrozenTrial") -> Path:
    """The folder for one attempt, below `trials`: a name that no other trial has, of no study and on no machine."""
    attempt = trial.user_attrs["attempt"]
    middle = f"retry{attempt}-" if attempt else ""
    return trials / f"{trial.user_attrs['point']:04d}-{middle}{secrets.token_hex(3)}"


def go_on(
    study: "optuna.Study", trial: "optuna.trial.FrozenTrial", home: Path
) -> tuple[Path, int] | None:
    """Copy the newest run of the earlier attempts at a trial's point into `home`, which doesn't exist yet.

    Returns the copy's checkpoint and its step; None where the trial has to begin at the beginning: no earlier attempt came to
    a checkpoint, or its folder is on another machine.
    """
    from tq_lightning.training.checkpoint import checkpoint_step

    for path in _checkpoints(study, trial, home.parent):
        run = path.parents[1]
        try:
            with atomic_write(home) as copy:
                # W&B's files stay: the fit that resumes makes a W&B run of its own
                ignored = shutil.ignore_patterns("wandb", "*.tmp")
                shutil.copytree(run, copy / run.name, ignore=ignored)
                step = checkpoint_step(copy / run.name / LAST)
        except UserError as error:
            print(f"cannot resume from {path}: {error}", file=sys.stderr, flush=True)
            continue
        return home / run.name / LAST, step
    return None


def _checkpoints(
    study: "optuna.Study", trial: "optuna.trial.FrozenTrial", trials: Path
) -> list[Path]:
    """The checkpoints of the earlier attempts, those of the last one first."""
    by_number = {t.number: t for t in study.get_trials(deepcopy=False)}
    found: list[Path] = []
    while "retry_of" in trial.user_attrs:
        trial = by_number[trial.user_attrs["retry_of"]]
        if "run_dir" in trial.user_attrs:  # else its worker died before it began
            there = (trials / Path(trial.user_attrs["run_dir"]).name).glob(f"*/{LAST}")
            found += sorted(there, key=lambda path: path.stat().st_mtime, reverse=True)
    return found
