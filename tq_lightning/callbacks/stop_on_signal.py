"""Stop a fit on SIGTERM or SIGUSR1, after the same optimizer step on all ranks, with last.ckpt."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from tq_lightning.callbacks.optimizer_steps import OptimizerSteps, validation_follows
from tq_lightning.errors import Interrupted

STOP, REQUEUE = 1, 2  # requests that ranks exchange; the larger one wins
# seconds after which a second SIGTERM is another request; `timeout` sends the first one twice
REPEAT_SECONDS = 5.0


class SignalFlag:
    """Context manager that turns signals into a flag, which a fit reads between two steps.

    SIGTERM requests a stop. SIGUSR1, the warning of a scheduler (`sbatch --signal=USR1@120`),
    requests a stop and a requeue. Before `defer` is called, there is nothing to save: SIGTERM
    raises `Interrupted` at once, and SIGUSR1 takes effect after the first step. A second SIGTERM
    more than `REPEAT_SECONDS` after the first raises at once. The step or validation may never end,
    for example if the worker processes of torch.compile received the first signal too and have
    exited.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._asked: float | None = None  # time of the first SIGTERM
        self.deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SignalFlag":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can set signal handlers
        for signum in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)):
            if signum is not None:  # Windows has no SIGUSR1
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def defer(self, deferred: bool = True) -> None:
        """Set whether SIGTERM takes effect after the current step or raises at once.

        Replaces the handlers that Lightning has installed.
        """
        self.deferred = deferred
        for signum in self._before:
            signal.signal(signum, self._receive)

    @property
    def request(self) -> int:
        """Requested action: 0, STOP or REQUEUE."""
        if self.signum is None:
            return 0
        return STOP if self.signum == signal.SIGTERM else REQUEUE

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum  # SLURM sends SIGTERM after its warning
        if signum != signal.SIGTERM:
            return
        now = time.monotonic()
        if not self.deferred:
            raise Interrupted(signum)
        if self._asked is not None and now - self._asked > REPEAT_SECONDS:
            raise Interrupted(self.signum, self.request == REQUEUE)
        self._asked = now if self._asked is None else self._asked


class StopOnSignal(L.Callback):
    """End a fit with `Interrupted` after the optimizer step in which any rank received a signal.

    Under accumulation the step is completed first. After the last batch of an epoch, or a batch
    that a validation follows, the fit ends after that validation: a run that resumes from a
    checkpoint between the two would skip it.

    At the start of each batch, ranks agree on the maximum of their flags. This reduction replaces
    Lightning's broadcast of a SIGTERM flag at the same point, so a step has no additional reduction
    or synchronization. A single process reads only its own flag.

    In validate, test and predict, SIGTERM raises `Interrupted` at once.

    Args:
        flag: the entered flag of this process.
    """

    def __init__(self, flag: SignalFlag) -> None:
        self.flag = flag
        self._agreed = 0
        self._steps = OptimizerSteps()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the deferred signal handlers, and disable Lightning's own flag."""
        self._steps.start(trainer)
        self.flag.defer()
        if trainer.world_size > 1:
            loop = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise at once outside of a fit; a validation within a fit is completed."""
        if trainer.state.fn != "fit":
            self.flag.defer(False)

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other ranks; stop before the first batch of an epoch, already saved."""
        if trainer.world_size > 1:
            request = torch.tensor(self.flag.request, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(request, torch.distributed.ReduceOp.MAX)
            self._agreed = int(request)
        else:
            self._agreed = self.flag.request
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
            self._agreed = self.flag.request
        if (
            self._agreed
            and stepped
            and trainer.global_step != trainer.max_steps
            and not validation_follows(trainer, batch_idx)
        ):
            self._save(trainer)
            self._stop()

    def _save(self, trainer: L.Trainer) -> None:
        """Do nothing: this run has no checkpoints."""

    def _stop(self) -> None:
        requeue = self._agreed == REQUEUE
        raise Interrupted(signal.SIGUSR1 if requeue else signal.SIGTERM, requeue)


class CheckpointOnSignal(StopOnSignal, Checkpoint):
    """`StopOnSignal` that writes `folder`/last.ckpt first.

    As a `Checkpoint`, it is called after all other callbacks, such as the moving average.

    Args:
        flag: the entered flag of this process.
        folder: folder of the run's checkpoints.
    """

    def __init__(self, flag: SignalFlag, folder: str | Path) -> None:
        super().__init__(flag)
        self.path = Path(folder) / "last.ckpt"

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)


def _do_nothing() -> None:
    pass
