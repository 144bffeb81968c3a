"""The objective of a sweep's study: one trial, from its parameters to its stored result."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tq_lightning.errors import UserError
from tq_lightning.records import mark_superseded
from tq_lightning.sweep.config import Sweep
from tq_lightning.sweep.resume import EarlierRun, attempt_folder, copy_earlier_run
from tq_lightning.sweep.search_space import fit_arguments, pruner, sampler, suggest
from tq_lightning.sweep.storage import retry_during_outage
from tq_lightning.sweep.trial import Fit, TrialResult, read_result, run_trial
from tq_lightning.sweep.trial_queue import RETRIED_CAUSES, TrialQueue

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Objective:
    """Run the claimed trials of a study as `fit` and store their results.

    Args:
        queue: the trial queue of the study.
        sweep: the sweep file.
        metrics: names of the objectives.
        trials: parent of the trial folders.
        fit: runs one trial.
    """

    queue: TrialQueue
    sweep: Sweep
    metrics: list[str]
    trials: Path
    fit: Fit

    def run(self, claimed: "optuna.trial.FrozenTrial") -> TrialResult:
        """Run a claimed trial, or return the result of an earlier attempt that was not stored."""
        folder = attempt_folder(self.trials, claimed)
        trial, argv = retry_during_outage(lambda: self._prepare(claimed, folder))
        earlier = retry_during_outage(lambda: copy_earlier_run(self.queue.study, claimed, folder))
        checkpoint = None
        if earlier is not None:
            if earlier.record is not None:
                return self._take_over(trial, earlier.trial, earlier.record)
            retry_during_outage(lambda: self._note_resume(trial, earlier))
            checkpoint = earlier.checkpoint
        prunes = self.sweep.early_terminate is not None and len(self.metrics) == 1
        report = _reporter(trial) if prunes else None
        return run_trial(self.fit, argv, folder, self.metrics, report, checkpoint)

    def store(self, claimed: "optuna.trial.FrozenTrial", result: TrialResult) -> None:
        """Write the result of a trial into the study."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        queue = self.queue
        try:
            if result.record is not None:
                queue.storage.set_trial_user_attr(claimed._trial_id, "record", result.record)
            if result.state == "complete":
                queue.study.tell(claimed.number, list(result.values), skip_if_finished=True)
            elif result.state == "pruned":
                queue.study.tell(claimed.number, state=TrialState.PRUNED, skip_if_finished=True)
            else:
                cause = "error" if result.state == "failed" else result.state
                queue.fail(claimed, cause, result.reason)
        except UpdateFinishedTrialError:
            trial = queue.storage.get_trial(claimed._trial_id)
            given_away = trial.user_attrs.get("cause") in RETRIED_CAUSES
            if result.record is not None and trial.state == TrialState.FAIL and given_away:
                with contextlib.suppress(UserError):  # reports skip an unreadable record anyway
                    mark_superseded(result.record)  # the other worker's result is used

    def _prepare(
        self, claimed: "optuna.trial.FrozenTrial", folder: Path
    ) -> tuple["optuna.trial.Trial", list[str]]:
        """Draw the parameters. Return the trial and the arguments of `fit`."""
        import optuna

        study, point = self.queue.study, claimed.user_attrs["point"]
        study.sampler = sampler(self.sweep, point)
        study.pruner = pruner(self.sweep, len(self.metrics))
        trial = optuna.trial.Trial(study, claimed._trial_id)
        argv = fit_arguments(self.sweep, suggest(self.sweep, trial))
        trial.set_user_attr("run_dir", str(folder))
        trial.set_user_attr("arguments", argv)
        return trial, argv

    def _take_over(
        self, trial: "optuna.trial.Trial", earlier: "optuna.trial.FrozenTrial", record: Path
    ) -> TrialResult:
        """Report the values of a finished attempt again and read its result."""
        values = earlier.intermediate_values
        for step, value in values.items():
            retry_during_outage(lambda s=step, v=value: trial.report(v, s))  # type: ignore[misc]
        pruned = earlier.user_attrs.get("pruned") == max(values, default=0) > 0
        return read_result(record, self.metrics, pruned)

    def _note_resume(self, trial: "optuna.trial.Trial", earlier: EarlierRun) -> None:
        trial.set_user_attr("resumed_step", earlier.step)
        last = self.queue.study.trials[trial.user_attrs["retry_of"]]
        if earlier.step > last.user_attrs.get("resumed_step", 0):
            trial.set_user_attr("lost", 0)  # the trial makes progress, so it may be retried again


def _reporter(trial: "optuna.trial.Trial") -> Callable[[int, float], bool]:
    """Return a function (step, value) -> True if the pruner stops the trial."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

    def report(step: int, value: float) -> bool:
        # a storage outage must not end the training
        with contextlib.suppress(StorageInternalError):
            try:
                trial.report(value, step)
                prune = trial.should_prune()
                if prune:  # a retry reads this attribute, because the record's status is finished
                    trial.set_user_attr("pruned", step)
                return prune
            except UpdateFinishedTrialError:
                return True  # the trial was given to another worker
        return False

    return report
