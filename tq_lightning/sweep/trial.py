"""Run one trial as a `fit` in its own directory and read its result from record.json."""

import contextlib
import gc
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_lightning.errors import Interrupted, message_of
from tq_lightning.records import NAME, Record, RecordError, read_any, value_of

Fit = Callable[[list[str]], dict[str, Any]]  # training.lightning_cli.run_fit, or a test's stand-in


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        state: complete, pruned, failed, interrupted or lost.
        values: one per objective if complete.
        reason: reason why the trial has no values.
        record: path of the run's record.json.
        signum: signal that made fit stop after a step; None otherwise.
    """

    state: str
    values: tuple[float, ...] = ()
    reason: str = ""
    record: str | None = None
    signum: int | None = None

    @property
    def cuda_is_broken(self) -> bool:
        """True after an error that makes all later CUDA calls fail; not for out of memory."""
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
    """Run `fit` in `folder` and read its record. Never raises, so that the sweep continues.

    Args:
        fit: runs the trial and returns its metrics and "record".
        argv: arguments of `fit`.
        folder: value of `trainer.default_root_dir`.
        metrics: names of the objectives, see `records.value_of`.
        report: (step, value) -> True to prune, for `ReportToStudy`; None without pruning.
        checkpoint: checkpoint of a run below `folder` to resume; None starts a new run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    argv = [*argv, f"--trainer.default_root_dir={folder}"]
    if checkpoint is not None:
        argv.append(f"--ckpt_path={checkpoint}")
    pruned = False

    def decide(step: int, value: float) -> bool:
        nonlocal pruned
        assert report is not None
        pruned = report(step, value)
        return pruned

    if report is not None:
        argv += [
            "--trainer.callbacks+=tq_lightning.sweep.pruning.ReportToStudy",
            f"--trainer.callbacks.monitor={metrics[0]}",
        ]
    failure, interrupted, signum, before = "", False, None, _records(folder)
    path: Path | None = None
    try:
        with _as_command(argv), _reporting(decide if report is not None else None):
            path = Path(fit(argv)["record"])
    except KeyboardInterrupt:
        interrupted = True
    except Interrupted as error:
        interrupted, signum = True, error.signum
    except SystemExit as error:
        failure = f"fit exited with status {error.code}"
    except BaseException as error:
        failure = f"{type(error).__name__}: {message_of(error)}"[:500]
    if failure:
        _free_memory()
    if path is None:  # fit raised, possibly after it wrote a record
        written = [path for path, when in _records(folder).items() if before.get(path) != when]
        path = written[0] if written else None
    shown = str(path) if path is not None else None
    if interrupted:
        return TrialResult("interrupted", reason="stopped by the user", record=shown, signum=signum)
    record = _read_record(path)
    if failure and (record is None or record.status != "interrupted"):
        return TrialResult("failed", reason=failure, record=shown)
    if path is None:
        return TrialResult("failed", reason=f"fit wrote no {NAME} in {folder}")
    return read_result(path, metrics, pruned)


def read_result(path: Path, metrics: list[str], pruned: bool = False) -> TrialResult:
    """Read the result of a run that has ended from its record.

    A trial fails if an objective is missing, or if any metric of the last epoch is not finite. If
    the weights are NaN, accuracies remain finite, but losses do not.
    """
    record, shown = _read_record(path), str(path)
    if record is None:
        return TrialResult("failed", reason=f"{path} is not a readable record", record=shown)
    if record.status == "interrupted":
        return TrialResult("interrupted", reason="stopped by the user", record=shown)
    if record.status == "failed":
        reason = record.reason or "the run failed without a reason in its record"
        return TrialResult("failed", reason=reason, record=shown)
    if pruned:
        return TrialResult("pruned", reason="pruned", record=shown)
    last = record.last.metrics if record.last is not None else {}
    for name, value in last.items():
        if value is not None and not math.isfinite(value):
            reason = f"non-finite: {name} is {value} in the last epoch"
            return TrialResult("failed", reason=reason, record=shown)
    values = []
    for name in metrics:
        value = value_of(record, name)
        if value is None:
            reason = f"{name} was never logged; the record has {', '.join(sorted(last))}"
            return TrialResult("failed", reason=reason, record=shown)
        values.append(value)
    return TrialResult("complete", tuple(values), record=shown)


def _read_record(path: Path | None) -> Record | None:
    try:
        record = read_any(path) if path is not None else None
    except RecordError:
        return None
    return record if isinstance(record, Record) else None


def _records(folder: Path) -> dict[Path, int]:
    """Return {record.json below a folder: mtime in ns}, to distinguish new records from copies."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob(NAME))}


@contextlib.contextmanager
def _as_command(argv: list[str]) -> Iterator[None]:
    """Make this process look like `python -m tq_lightning fit ARGV`.

    Under DDP, Lightning starts the other ranks of a trial with the name of the main module and with
    sys.argv.
    """
    module: Any = sys.modules["__main__"]
    before = sys.argv, getattr(module, "__spec__", None)
    sys.argv = [sys.argv[0], "fit", *argv]
    module.__spec__ = importlib.util.find_spec("tq_lightning.__main__")
    try:
        yield
    finally:
        sys.argv, module.__spec__ = before


@contextlib.contextmanager
def _reporting(decide: Callable[[int, float], bool] | None) -> Iterator[None]:
    """Connect `ReportToStudy` to this trial. Without pruning, its module is not imported."""
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
    """Free the objects that the traceback of a failed fit keeps alive, before the next trial."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # if CUDA is broken, nothing can be freed
            torch.cuda.empty_cache()
