"""Stop a fit on SIGTERM or SIGUSR1: after the same optimizer step on all ranks, with last.ckpt."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from tq_lightning.callbacks.optimizer_steps import OptimizerSteps, validation_follows
from tq_lightning.errors import Interrupted

STOP, REQUEUE = 1, 2  # what ranks tell each other; the larger one wins


class SignalFlag:
    """Signals as a flag that a fit reads between two steps. A context manager around the fit.

    SIGTERM asks for an end. SIGUSR1 is the warning of a scheduler (`sbatch --signal=USR1@120`) and
    asks for another run as well. Until `defer` is called there is nothing to save: SIGTERM raises
    `Interrupted` at once, and SIGUSR1 waits for the first step.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SignalFlag":
        if threading.current_thread() is not threading.main_thread():
            return self  # handlers belong to the main thread
        for signum in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)):
            if signum is not None:  # Windows has no SIGUSR1
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def defer(self, deferred: bool = True) -> None:
        """Let SIGTERM wait for the end of a step, or raise at once.

        Called after Lightning has installed its own handlers, which this replaces.
        """
        self.deferred = deferred
        for signum in self._before:
            signal.signal(signum, self._receive)

    @property
    def wish(self) -> int:
        """0, STOP or REQUEUE."""
        if self.signum is None:
            return 0
        return STOP if self.signum == signal.SIGTERM else REQUEUE

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum  # SLURM follows its warning up with a SIGTERM
        if signum == signal.SIGTERM and not self.deferred:
            raise Interrupted(signum)


class StopOnSignal(L.Callback):
    """Ends a fit with `Interrupted` after the optimizer step in which a signal arrived at any rank.

    Under accumulation the step is completed first. After the last batch of an epoch, or a batch
    that a validation follows, the fit ends after that validation: a run that resumes from a
    checkpoint between the two would skip it.

    Ranks agree by the maximum of their flags at the start of each batch. This reduction takes the
    place of the SIGTERM flag that Lightning broadcasts and reads at the same point, so a step has
    neither a reduction nor a host read more than before. A single process reads its own flag. A
    flag that travels with the gradients would need a host read of its own.

    In validate, test and predict SIGTERM raises `Interrupted` at once.

    Args:
        flag: the entered flag of this process.
    """

    def __init__(self, flag: SignalFlag) -> None:
        self.flag = flag
        self._agreed = 0
        self._steps = OptimizerSteps()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over, and the place of Lightning's own flag."""
        self._steps.start(trainer)
        self.flag.defer()
        if trainer.world_size > 1:
            loop = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over in an evaluation; the validation of a fit waits for its end."""
        if trainer.state.fn != "fit":
            self.flag.defer(False)

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other ranks; stop here if the epoch before has written last.ckpt."""
        if trainer.world_size > 1:
            wish = torch.tensor(self.flag.wish, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(wish, torch.distributed.ReduceOp.MAX)
            self._agreed = int(wish)
        else:
            self._agreed = self.flag.wish
        if self._agreed and batch_idx == 0:
            self._stop()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save and stop, if this batch completed an optimizer step."""
        stepped = self._steps.advanced(trainer)
        if trainer.world_size == 1:
            self._agreed = self.flag.wish
        if (
            self._agreed
            and stepped
            and trainer.global_step != trainer.max_steps
            and not validation_follows(trainer, batch_idx)
        ):
            self._save(trainer)
            self._stop()

    def _save(self, trainer: L.Trainer) -> None:
        """Nothing: this run has no checkpoints."""

    def _stop(self) -> None:
        requeue = self._agreed == REQUEUE
        raise Interrupted(signal.SIGUSR1 if requeue else signal.SIGTERM, requeue)


class CheckpointOnSignal(StopOnSignal, Checkpoint):
    """`StopOnSignal` that writes `folder`/last.ckpt first.

    As a `Checkpoint` it is called after all other callbacks, such as the moving average.

    Args:
        flag: as `StopOnSignal`. folder: of the run's checkpoints.
    """

    def __init__(self, flag: SignalFlag, folder: str | Path) -> None:
        super().__init__(flag)
        self.path = Path(folder) / "last.ckpt"

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)


def _nothing() -> None:
    pass
