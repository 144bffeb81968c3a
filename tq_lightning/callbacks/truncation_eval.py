"""TruncationEval: every validation epoch scores every width, truncated, and quantized wherever that differs."""

from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.bit_width import bit_width, width_of
from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.switchable_norm import calibrate_norms, per_width_norms, untrained_widths
from tq_lightning.quant.weight import shared_normalization, weight_quantizers

Pass = tuple[int | None, str]


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
    """(width, source) of every pass an evaluation takes, widest first, float last; what agrees is run once, truncated."""
    passes: list[Pass] = []
    for bits in range(width_of(model).max_bits, 0, -1):
        passes.append((bits, "truncate"))
        if not sources_agree(model, bits):
            passes.append((bits, "quantize"))
    return [*passes, (None, "quantize")]


@torch.no_grad()
def evaluate_batch(model: nn.Module, images: Tensor, passes: list[Pass]) -> dict[Pass, Tensor]:
    """Logits (batch, classes) of one batch at every pass; the weights are normalised once for all of them.

    Inside `shared_normalization(model)` they are so once for all batches.
    """
    logits = {}
    with shared_normalization(model):
        for bits, source in passes:
            with bit_width(model, bits, source):
                logits[bits, source] = model(images)
    return logits


def width_metrics(
    stage: str, accuracy: dict[Pass, float], max_bits: int, trained: tuple[int, ...]
) -> dict[str, float]:
    """The metric keys of an evaluation: `stage`/acc1_quantize_w4 and so on for every width, in %; gaps in points."""
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


class TruncationEval(L.Callback):
    """Scores every width 1..max_bits on the validation (and test) data and logs the keys of `width_metrics`.

    Norm statistics of untrained widths are estimated from `calibration_batches` fixed training batches at the start of
    each validation epoch, into sets of their own, which the checkpoint keeps; a test uses those of its checkpoint. Once
    training goes on these sets are marked as not calibrated: they belong to the weights they were estimated with. Apart
    from these sets parameters, buffers, modes, width and random states stay as they were. The end of a run, by epochs or
    by steps, is always scored, whatever `trainer.check_val_every_n_epoch` says: a run without its result is none.
    """

    def __init__(self, calibration_batches: int = 8) -> None:
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches must be at least 1, got {calibration_batches}")
        self.calibration_batches = calibration_batches
        self._passes: list[Pass] = []
        self._accuracy: dict[Pass, MulticlassAccuracy] = {}
        self._images = SumMetric()
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._fresh = True
        # open through an evaluation, in which no weight changes: they are normalised and coded once for all its batches
        self._weights = ExitStack()

    def _start(self, trainer: L.Trainer, module: Any, calibrate: bool) -> None:
        self._weights.close()
        self._weights.enter_context(shared_normalization(module))
        if calibrate and untrained_widths(module):
            if not self._batches:
                self._batches = list(
                    trainer.datamodule.calibration_batches(self.calibration_batches)
                )  # type: ignore[attr-defined]
            with trainer.precision_plugin.forward_context():
                calibrate_norms(module, [images.to(module.device) for images, _ in self._batches])
            self._fresh = True
        self._passes = evaluation_passes(module)
        classes = module.hparams.num_classes
        self._images = SumMetric().to(module.device)
        self._accuracy = {
            p: MulticlassAccuracy(classes, average="micro", validate_args=False).to(module.device)
            for p in self._passes
        }

    def _score(self, trainer: L.Trainer, module: Any, batch: tuple[Tensor, Tensor]) -> None:
        images, target = batch
        with trainer.precision_plugin.forward_context():
            logits = evaluate_batch(module, images, self._passes)
        self._images.update(len(target))
        for p, out in logits.items():
            self._accuracy[p].update(out.argmax(1), target)

    def _end(self, module: Any, stage: str) -> None:
        self._weights.close()
        accuracy = {
            p: round(100.0 * float(metric.compute()), 5) for p, metric in self._accuracy.items()
        }
        values = width_metrics(stage, accuracy, module.hparams.max_bits, module.widths)
        # every process has computed the same values: sync_dist keeps Lightning from warning of each of them
        module.log_dict(
            {**values, f"{stage}/images": float(self._images.compute())}, sync_dist=True
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._fresh:
            for norm in per_width_norms(pl_module):
                norm.calibrated.zero_()
            self._fresh = False
        if trainer.check_val_every_n_epoch is None:  # the caller's own interval, in batches
            return
        steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if (
            trainer.global_step + 1 == trainer.max_steps and steps
        ):  # a run ends here, inside an epoch or not
            trainer.check_val_every_n_epoch, trainer.val_check_batch = 1, batch_idx + 1
        elif trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if (
            not trainer.sanity_checking
        ):  # a sanity check is no epoch: nothing is estimated, scored or logged
            # `validate` on a checkpoint scores what the checkpoint holds, as `test` does
            self._start(
                trainer,
                pl_module,
                calibrate=trainer.state.fn == "fit" or not _calibrated(pl_module),
            )

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
            self._end(pl_module, "val")

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
        self._end(pl_module, "test")


def _calibrated(model: nn.Module) -> bool:
    """Whether every untrained width has norm statistics of its own already (as a checkpoint of a fit has)."""
    norms = per_width_norms(model)
    widths = [bits for bits in untrained_widths(model) if bits is not None]
    return all(bool(norm.calibrated[bits]) for norm in norms[:1] for bits in widths)
