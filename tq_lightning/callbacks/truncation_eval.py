"""TruncationEval: evaluate every width, truncated and, wherever that differs, quantized."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.bit_width import bit_width, width_of
from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.switchable_norm import calibrate_norms, per_width_norms, untrained_widths
from tq_lightning.quant.weight import weight_quantizers

Pass = tuple[int | None, str]
TOP = 5  # classes; with fewer, top-5 is left out


def sources_agree(model: nn.Module, bits: int) -> bool:
    """Tell whether quantize and truncate give the same network at `bits` by construction.

    They do if nothing is shifted, or if the codes of everything that is shifted nest.
    """
    if bits == width_of(model).max_bits:
        return True
    shifted = {w.quantizer.quantizer for w in weight_quantizers(model)}
    shifted |= {
        m.quantizer for m in model.modules() if isinstance(m, ActivationQuantizer) and m.truncated
    }
    return all(QUANTIZERS[name].nested for name in shifted)


def evaluation_passes(model: nn.Module) -> list[Pass]:
    """Return the (width, source) pairs to evaluate, widest first, float last.

    Pairs that agree by construction run once, truncated.
    """
    passes: list[Pass] = []
    for bits in range(width_of(model).max_bits, 0, -1):
        passes.append((bits, "truncate"))
        if not sources_agree(model, bits):
            passes.append((bits, "quantize"))
    return [*passes, (None, "quantize")]


@torch.no_grad()
def evaluate_batch(model: nn.Module, images: Tensor, passes: list[Pass]) -> dict[Pass, Tensor]:
    """Return the logits (batch, classes) of one batch for every pass.

    The weights are normalized once for all passes, and inside `fused_weights(model)` once
    for all batches.
    """
    logits = {}
    with fused_weights(model):
        for bits, source in passes:
            with bit_width(model, bits, source):
                logits[bits, source] = model(images)
    return logits


def width_metrics(
    stage: str, accuracy: dict[Pass, float], max_bits: int, trained: tuple[int, ...]
) -> dict[str, float]:
    """Return top-1 in % of both sources for every width, and the QT gaps in percentage points.

    The keys are `stage`/acc1_quantize_w4 and so on.
    """
    metrics = {}
    for bits in range(max_bits, 0, -1):
        truncate = accuracy[bits, "truncate"]
        quantize = accuracy.get((bits, "quantize"), truncate)
        metrics[f"{stage}/acc1_quantize_w{bits}"] = quantize
        metrics[f"{stage}/acc1_truncate_w{bits}"] = truncate
        metrics[f"{stage}/qt_gap_w{bits}"] = quantize - truncate
    metrics[f"{stage}/acc1_truncate_mean"] = sum(accuracy[b, "truncate"] for b in trained) / len(
        trained
    )
    metrics[f"{stage}/acc1_float"] = accuracy[None, "quantize"]
    return metrics


def top5_metrics(
    stage: str, accuracy: dict[Pass, float], trained: tuple[int, ...]
) -> dict[str, float]:
    """Return top-5 in % of the truncated weights at every width, their mean, and float.

    The mean is over the trained widths.
    """
    truncated = {bits: value for (bits, source), value in accuracy.items() if source == "truncate"}
    metrics = {f"{stage}/acc5_truncate_w{bits}": value for bits, value in truncated.items()}
    metrics[f"{stage}/acc5_truncate_mean"] = sum(truncated[b] for b in trained) / len(trained)
    metrics[f"{stage}/acc5_float"] = accuracy[None, "quantize"]
    return metrics


def hits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Tell for each image whether top-1 and top-5 are right: two bool tensors (batch,)."""
    first = logits.argmax(1) == target
    likeliest = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    return first, (likeliest == target[:, None]).any(1)


class TruncationEval(L.Callback):
    """Scores every width 1..max_bits on the validation (and test) data.

    It logs the keys of `width_metrics`, of `top5_metrics` (for 5 classes or more), and the
    cross-entropy of the truncated weights: `val/loss_w4` for each trained width, and `val/loss`,
    their mean. Loggers get them from `MetricLog`.

    Norm statistics of untrained widths are estimated from `calibration_batches` fixed training
    batches at the start of each validation epoch, into norms of their own, which the checkpoint
    keeps; a test uses those of its checkpoint. Once training continues, these norms are marked as
    not calibrated: they belong to the weights they were estimated with. Everything else
    (parameters, buffers, modes, width, random states) stays as it was.

    The end of a run is always scored, whatever `trainer.check_val_every_n_epoch` says and whatever
    ended it: epochs, steps, `max_time`, or a callback that stops the Trainer.

    Args:
        calibration_batches: training batches for the norm statistics of untrained widths.
    """

    def __init__(self, calibration_batches: int = 8) -> None:
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {calibration_batches}")
        self.calibration_batches = calibration_batches
        self._passes: list[Pass] = []
        self._hits: dict[Pass, Tensor] = {}  # (images, top-1, top-5)
        self._losses: dict[int, Tensor] = {}  # sums
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._fresh = True
        self._scored_step: int | None = None
        self._trained = False  # since this process started
        # open during an evaluation, in which no weight changes: they are normalized and coded once
        self._weights = ExitStack()

    def _start(self, trainer: L.Trainer, module: Any, calibrate: bool) -> None:
        self._weights.close()
        self._weights.enter_context(fused_weights(module))
        if calibrate and untrained_widths(module):
            if not self._batches:
                batches = trainer.datamodule.calibration_batches(self.calibration_batches)  # type: ignore[attr-defined]
                self._batches = list(batches)
            with trainer.precision_plugin.forward_context():
                calibrate_norms(module, [images.to(module.device) for images, _ in self._batches])
            self._fresh = True
        self._passes = evaluation_passes(module)
        zeros = torch.zeros(3, dtype=torch.int64, device=module.device)
        self._hits = {p: zeros.clone() for p in self._passes}
        self._losses = {bits: torch.zeros((), device=module.device) for bits in module.widths}

    def _score(self, trainer: L.Trainer, module: Any, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        with trainer.precision_plugin.forward_context():
            logits = evaluate_batch(module, images, self._passes)
        for p, out in logits.items():
            self._hits[p] += torch.stack(
                [target.new_tensor(len(target)), *(h.sum() for h in hits(out, target))]
            )
        for bits, total in self._losses.items():
            total += F.cross_entropy(logits[bits, "truncate"].float(), target, reduction="sum")

    def _end(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self._weights.close()
        strategy, shape = trainer.strategy, (len(self._passes), 3)
        counts = strategy.reduce(torch.stack(list(self._hits.values())), reduce_op="sum")
        sums = strategy.reduce(torch.stack(list(self._losses.values())), reduce_op="sum")
        images, top1, top5 = counts.view(shape).T.cpu()  # type: ignore[union-attr]
        accuracy, second = (
            {
                p: round(100.0 * float(n / total), 5)
                for p, n, total in zip(self._passes, hits, images, strict=True)
            }
            for hits in (top1, top5)
        )
        values = width_metrics(stage, accuracy, module.hparams.max_bits, module.widths)
        if module.hparams.num_classes >= TOP:
            values |= top5_metrics(stage, second, module.widths)
        losses = {b: float(s) / int(images[0]) for b, s in zip(self._losses, sums, strict=True)}
        values |= {f"{stage}/loss_w{bits}": loss for bits, loss in losses.items()}
        values[f"{stage}/loss"] = sum(losses.values()) / len(losses)
        # every process has the same values: sync_dist keeps Lightning from warning about each
        values[f"{stage}/images"] = float(images[0])
        module.log_dict(values, sync_dist=True, logger=False)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True
        if self._fresh:
            for norm in per_width_norms(pl_module):
                norm.calibrated.zero_()
            self._fresh = False
        if trainer.check_val_every_n_epoch is None:  # the caller's own interval, in batches
            return
        steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if trainer.global_step + 1 == trainer.max_steps and steps:  # the end, maybe in an epoch
            trainer.check_val_every_n_epoch, trainer.val_check_batch = 1, batch_idx + 1
        elif trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early  # max_time is over
        if stops and trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = 1

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validate the end of a run that a callback stopped, or that has had no validation."""
        missing = trainer.should_stop or (self._scored_step is None and self._trained)
        if not missing or self._scored_step == trainer.global_step or not trainer.enable_validation:
            return
        # the counters of the Trainer, and so those in checkpoints, as in the validation of an epoch
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.processed, progress.completed = progress.processed - 1, progress.completed - 1
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
            progress.processed += 1
        for callback in trainer.checkpoint_callbacks:  # the norms of untrained widths have changed
            if isinstance(callback, ModelCheckpoint) and callback.filename == "last":
                trainer.save_checkpoint(Path(str(callback.dirpath)) / "last.ckpt")
        progress.completed += 1

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            # `validate` on a checkpoint scores what the checkpoint holds, as `test` does
            calibrate = trainer.state.fn == "fit" or not _calibrated(pl_module)
            self._start(trainer, pl_module, calibrate)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
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
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._end(trainer, pl_module, "test")


def _calibrated(model: nn.Module) -> bool:
    """Tell whether every untrained width has norm statistics, as in a checkpoint of a fit."""
    norms = per_width_norms(model)
    widths = [bits for bits in untrained_widths(model) if bits is not None]
    return all(bool(norm.calibrated[bits]) for norm in norms[:1] for bits in widths)
