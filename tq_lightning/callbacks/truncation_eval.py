"""TruncationEval: evaluate every width truncated and, if the result can differ, quantized."""

from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from tq_lightning.callbacks.optimizer_steps import takes_step
from tq_lightning.callbacks.resume import seed_all
from tq_lightning.callbacks.scores import SCORES
from tq_lightning.callbacks.width_metrics import Pass, evaluate_batch, evaluation_passes
from tq_lightning.errors import UserError
from tq_lightning.quant.batches import split_batch, to_device
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.label_checks import check_labels, check_logits
from tq_lightning.quant.norm_calibration import calibrate_norms, lagging_widths, reestimate_norms
from tq_lightning.quant.switchable_norm import per_width_norms, untrained_widths

CALIBRATION = "augmented"  # value of `calibration` in records


def training_batches(
    data: Any, n: int, device: torch.device | str = "cpu", set_up: bool = True
) -> list[Any]:
    """Return up to `n` batches of a user's LightningDataModule, as a fit gets them.

    They do not depend on the random state, so they are the same after a resume, and do not change
    it.

    Args:
        data: the data module.
        n: number of batches.
        device: device of the batches.
        set_up: call `setup("fit")` first.
    """
    batches = []
    with isolate_rng():
        seed_all(0)
        if set_up:
            data.setup("fit")
        for batch in islice(data.train_dataloader(), n):
            batch = data.on_before_batch_transfer(batch, 0)
            batch = data.transfer_batch_to_device(batch, torch.device(device), 0)
            batches.append(data.on_after_batch_transfer(batch, 0))
    return batches


class TruncationEval(L.Callback):
    """Evaluate every width 1..max_bits on the validation (and test) data.

    It logs the keys of `width_metrics` and of `top5_metrics` (for 5 classes or more), or those of
    `perplexity_metrics` for a language model, and the cross-entropy of the truncated weights:
    `val/loss_w4` for each trained width, and `val/loss`, their mean. Loggers get them from
    `MetricLog`.

    At the start of each validation epoch, the norm statistics of untrained widths are estimated
    from `calibration_batches` fixed training batches, augmented as in training. They are stored in
    separate norms, which checkpoints include; a test uses those of its checkpoint. When training
    continues, these norms are marked as not calibrated, because they belong to earlier weights.
    Parameters, other buffers, modes, the width and random states do not change.

    The end of a run is always evaluated, regardless of `trainer.check_val_every_n_epoch` and of the
    cause: epochs, steps, `max_time`, or a callback that stops the Trainer.

    Args:
        calibration_batches: training batches for the norm statistics of untrained widths.
    """

    def __init__(self, calibration_batches: int = 8) -> None:
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {calibration_batches}")
        self.calibration_batches = calibration_batches
        self._passes: list[Pass] = []
        self._scores: Any = None
        self._batches: list[Any] = []  # inputs of calibration batches, on the CPU
        self._fresh = True
        self._scored_step: int | None = None
        self._trained = False  # since this process started
        # open during an evaluation: the weights do not change and are normalized only once
        self._weights = ExitStack()

    def _start(self, trainer: L.Trainer, module: Any, calibrate: bool) -> None:
        self._weights.close()
        module.drop_stale_weights()
        self._weights.enter_context(fused_weights(module, keep=True))
        lagging = lagging_widths(module) if calibrate else []
        if calibrate and (lagging or untrained_widths(module)):
            if not self._batches:
                self._batches = self._calibration_inputs(trainer, module)
            batches = [to_device(inputs, module.device) for inputs in self._batches]
            with trainer.precision_plugin.forward_context():
                calibrate_norms(module, batches)
                reestimate_norms(module, batches, lagging)
            self._fresh = True
        self._passes = evaluation_passes(module)
        scores = SCORES[module.hparams.task]
        self._scores = scores(self._passes, module.hparams, module.widths, module.device)

    def _calibration_inputs(self, trainer: L.Trainer, module: Any) -> list[Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise UserError(
                "norm statistics are estimated from training batches of a data module, got "
                "loaders; pass datamodule=, a LightningDataModule, to the Trainer"
            )
        if hasattr(data, "calibration_batches"):
            batches = data.calibration_batches(self.calibration_batches)
        else:  # a data module of the user
            set_up = trainer.state.fn != "fit"
            batches = training_batches(data, self.calibration_batches, module.device, set_up)
        return [to_device(split_batch(batch)[0], "cpu") for batch in batches]

    def _score(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        inputs, target = split_batch(batch)
        with trainer.precision_plugin.forward_context():
            logits = evaluate_batch(module, inputs, self._passes)
        first = next(iter(logits.values()))
        check_logits(module.hparams.task, first, target)
        if not module.classes_are_known:  # reading the labels would make a GPU wait
            check_labels(first, target)
        self._scores.add(logits, target)

    def _end(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self._weights.close()
        strategy = trainer.strategy
        values = self._scores.metrics(stage, lambda x: strategy.reduce(x, reduce_op="sum"))
        # all processes have the same values; sync_dist only avoids Lightning's warnings
        module.log_dict(values, sync_dist=True, logger=False)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True
        if self._fresh:
            for norm in per_width_norms(pl_module):
                norm.calibrated.zero_()
            self._fresh = False
        if trainer.check_val_every_n_epoch is None:  # the user chose an interval in batches
            return
        last = trainer.global_step + 1 == trainer.max_steps and takes_step(trainer, batch_idx)
        if last:  # may end within an epoch
            trainer.check_val_every_n_epoch, trainer.val_check_batch = 1, batch_idx + 1
        elif trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early  # max_time is over
        if stops and trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = 1

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validate the end of a run that a callback stopped, or that had no validation."""
        missing = trainer.should_stop or (self._scored_step is None and self._trained)
        if not missing or self._scored_step == trainer.global_step or not trainer.enable_validation:
            return
        # set the counters of the Trainer, which checkpoints store, as in a regular validation
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.processed, progress.completed = progress.processed - 1, progress.completed - 1
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
            progress.processed += 1
        for callback in trainer.checkpoint_callbacks:  # save the new norms of untrained widths
            if isinstance(callback, ModelCheckpoint) and callback.filename == "last":
                trainer.save_checkpoint(Path(str(callback.dirpath)) / "last.ckpt")
        progress.completed += 1

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            # `validate` uses the norms of its checkpoint, like `test`
            calibrate = trainer.state.fn == "fit" or not _calibrated(pl_module)
            self._start(trainer, pl_module, calibrate)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._score(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._end(trainer, pl_module, "val")
            self._scored_step = trainer.global_step

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._weights.close()

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._start(trainer, pl_module, calibrate=not _calibrated(pl_module))

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._score(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._end(trainer, pl_module, "test")


def _calibrated(model: nn.Module) -> bool:
    """Return True if every untrained width has norm statistics, as in a checkpoint of a fit."""
    norms = per_width_norms(model)
    widths = [bits for bits in untrained_widths(model) if bits is not None]
    return all(bool(norm.calibrated[bits]) for norm in norms[:1] for bits in widths)
