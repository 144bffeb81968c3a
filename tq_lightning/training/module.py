"""TQModule: the LightningModule that trains a timm model at several widths at once."""

import os
import random
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tq_lightning.errors import TrainingError, UserError
from tq_lightning.quant.bit_width import bit_width
from tq_lightning.quant.prepare import PrepareReport
from tq_lightning.training.joint import idle_parameters, joint_loss
from tq_lightning.training.losses import LOSSES, EpochLosses, taught
from tq_lightning.training.validation import (
    as_ints,
    check,
    check_trainer,
    pass_weights,
    trained_widths,
)
from tq_lightning.training.width_schedules import WIDTH_SCHEDULES


def width_key(bits: int | None) -> str:
    """How a width is written in metric keys: w4, or float."""
    return "float" if bits is None else f"w{bits}"


class TQModule(L.LightningModule):
    """A timm model with its quantizers, trained jointly at `widths`. The signature is the configuration.

    Args:
        name: model name, as `timm.create_model` takes it; resnet8_cifar, resnet20_cifar, resnet56_cifar and
            preresnet20_cifar are registered too.
        pretrained: load timm's weights (downloads them).
        checkpoint_path: file of float weights to start from.
        num_classes: classes of the head; null = those of the data set.
        model_args: further arguments of the model, e.g. {expansion: 5} or {img_size: 32}.
        drop_rate: dropout before the classifier; null = the model's default.
        drop_path_rate: stochastic depth; null = the model's default.
        quantizer: floor (TruncQuant) or round (baseline).
        ste: auto, identity, scaled, slope, clipped, ewgs or dsq; auto = scaled for floor, identity for round.
        level: endpoint, left or centre.
        normalizer: tanh, tanh_channel, absmax or absmax_channel.
        widths: trained widths, e.g. 8,4,2,1.
        max_bits: stored width.
        activations: null, or clamp_round, clamp_floor, pact_round, pact_floor, each also with _truncate.
        skip: layers left in float: first, last, and name patterns.
        norm: per_width, per_width_all (layer norms too) or shared.
        loss: cross_entropy or bce, against the labels.
        teacher: who teaches the narrower widths: none (labels), widest, recursive (the next wider), external.
        teacher_name: external timm teacher; it teaches the widest width, or all with teacher=external.
        teacher_checkpoint_path: its weights; null = timm's pretrained ones.
        distill_weight: share of the teacher's loss at a taught width, the labels get the rest.
        temperature: of the distillation.
        float_pass: train a float pass (bits=None) too, ahead of the widths.
        width_schedule: all, or sandwich (widest, narrowest and `sandwich_random` others a step).
        sandwich_random: random widths a step of the sandwich.
        width_weights: factor of each width's loss, in the order of `widths`, the float pass's ahead; null = 1 each.
        opt: optimiser, a name of timm's (sgd, adam, adamw, lamb, ...).
        lr: learning rate at the top of the schedule.
        weight_decay: weight decay.
        momentum: of sgd and the like.
        opt_args: further arguments of the optimiser, e.g. {betas: [0.9, 0.95]}.
        sched: schedule, a name of timm's (cosine, step, multistep, poly, tanh, none), stepped every update.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: where it starts.
        min_lr: where cosine and poly end.
        decay_epochs: epochs between decays (step), or their epochs (multistep), e.g. 100,150,180.
        decay_rate: factor of a decay; power of poly.
        ema_decay: decay of an exponential moving average of the weights, which is then what is evaluated; null = none.
        calibration_batches: training batches that the norm statistics of untrained widths are estimated from.
        channels_last: lay convolutions out as (batch, height, width, channels) in memory: faster on most devices.
        compile: run the model through torch.compile.
        seed: of the width schedule and the random states of each step; null = the run's seed.
    """

    hparams: Any  # type: ignore[assignment]  # an AttributeDict, which its annotation in Lightning does not say

    def __init__(
        self,
        name: str = "resnet8_cifar",
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        num_classes: int | None = None,
        model_args: dict[str, Any] | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        quantizer: str = "floor",
        ste: str = "auto",
        level: str = "endpoint",
        normalizer: str = "tanh",
        widths: list[int] | int | str = [8, 4, 2, 1],  # noqa: B006
        max_bits: int = 8,
        activations: str | None = None,
        skip: list[str] | str = ["first", "last"],  # noqa: B006
        norm: str = "per_width",
        loss: str = "cross_entropy",
        teacher: str = "recursive",
        teacher_name: str | None = None,
        teacher_checkpoint_path: str | None = None,
        distill_weight: float = 1.0,
        temperature: float = 1.0,
        float_pass: bool = False,
        width_schedule: str = "all",
        sandwich_random: int = 1,
        width_weights: list[float] | float | str | None = None,
        opt: str = "sgd",
        lr: float = 0.05,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        opt_args: dict[str, Any] | None = None,
        sched: str = "cosine",
        warmup_epochs: float = 0.0,
        warmup_lr: float = 1e-5,
        min_lr: float = 0.0,
        decay_epochs: list[float] | float | str = 30.0,
        decay_rate: float = 0.1,
        ema_decay: float | None = None,
        calibration_batches: int = 8,
        channels_last: bool = False,
        compile: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check(self.hparams)
        self.widths = trained_widths(widths, max_bits)
        ahead: tuple[None, ...] = (None,) if float_pass else ()
        self.passes: tuple[int | None, ...] = ahead + self.widths
        self.width_weights = pass_weights(
            width_weights, (*ahead, *as_ints(widths, "model.widths"))
        )  # as they were given
        self.model: nn.Module | None = None
        self.report: PrepareReport | None = None
        # plain lists hide the teacher and the compiled twin from parameters(), state_dict() and the checkpoint
        self._teacher: list[nn.Module] = []
        self._compiled: list[Any] = []
        self._idle: list[nn.Parameter] = []
        self._epoch_losses = EpochLosses()
        self.loaded_epoch: int | None = None

    def configure_callbacks(self) -> list[L.Callback]:
        """What belongs to every run: the moving average (first, so that it is what gets evaluated) and the evaluation."""
        from tq_lightning.callbacks.ema import MovingAverage
        from tq_lightning.callbacks.resume import StepSeeds
        from tq_lightning.callbacks.truncation_eval import TruncationEval

        callbacks: list[L.Callback] = [
            StepSeeds(),
            TruncationEval(self.hparams.calibration_batches),
        ]
        if self.hparams.ema_decay is not None:
            callbacks.insert(0, MovingAverage(self.hparams.ema_decay))
        return callbacks

    def setup(self, stage: str) -> None:
        check_trainer(self.trainer)

    # -- the model -------------------------------------------------------------------------------------------------
    def configure_model(self) -> None:
        """Builds and prepares the model once, before the strategy wraps it; the head's size may come from the data."""
        if self.model is not None:
            return
        from tq_lightning.training.factory import build_model, build_teacher

        h = self.hparams
        data = getattr(self._trainer, "datamodule", None)
        if h.num_classes is None:
            if data is None:
                raise UserError(
                    "model.num_classes is null and there is no data set to take it from; pass model.num_classes"
                )
            h.num_classes = data.num_classes
        self.attach(build_model(h))
        if self._trainer is not None and self._trainer.state.fn == "fit":
            teacher = build_teacher(h)
            self._teacher = [] if teacher is None else [teacher]

    def attach(self, model: nn.Module) -> None:
        """Prepares `model` as the hyper-parameters say and takes it as this module's model."""
        from tq_lightning.training.factory import prepare_model

        verbose = (
            self._trainer is not None
            and self._trainer.state.fn == "fit"
            and self._trainer.is_global_zero
        )
        self.report = prepare_model(model, self.hparams, self.widths, verbose)
        self.model = model
        if self.hparams.compile:
            self._compiled = [torch.compile(model)]

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> logits (batch, classes), at the width in use."""
        assert self.model is not None
        if self.hparams.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return (self._compiled[0] if self._compiled else self.model)(images)

    # -- the joint step --------------------------------------------------------------------------------------------
    def step_widths(self, step: int) -> tuple[int | None, ...]:
        """The passes of a step, widest first: a function of seed and step alone, so that a resumed run sees the same."""
        draw = random.Random(f"{self.run_seed}-{step}")
        return WIDTH_SCHEDULES[self.hparams.width_schedule](
            self.passes, self.hparams.sandwich_random, draw
        )

    @property
    def run_seed(self) -> int:
        """Seed of the step's random states: `seed`, else the run's `seed_everything`, else 0."""
        if self.hparams.seed is not None:
            return self.hparams.seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        h = self.hparams
        passes = self.step_widths(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        outside = None
        if self._teacher:
            with torch.no_grad():
                outside = self._teacher[0].to(images.device)(images)

        width_loss = taught(
            LOSSES[h.loss], target, h.teacher, outside, h.distill_weight, h.temperature
        )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        weights = [self.width_weights[b] for b in passes]
        try:
            loss, losses = joint_loss(self, images, passes, width_loss, weights, scale)
        except (TrainingError, ValueError) as error:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise TrainingError(
                f"step {self.global_step}: {error} (learning rate {lr:g})"
            ) from None
        self._idle = [p for p in idle_parameters(self, loss) if p.grad is None]
        values = {f"train/loss_{width_key(b)}": value for b, value in losses.items()}
        if batch_idx == 0:
            self._epoch_losses.state.clear()
        self._epoch_losses.add(values, len(images))
        self.log(
            "train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, logger=False
        )
        return loss

    def on_train_epoch_end(self) -> None:
        means = {
            key: self.trainer.strategy.reduce(mean, reduce_op="mean")
            for key, mean in self._epoch_losses.means().items()
        }
        self.log_dict(means, logger=False)
        # Lightning would write the row after the epoch's checkpoint, and a run killed between the two would go on without it;
        # a row that is ahead of its checkpoint is dropped and comes again
        row = {**{key: float(mean) for key, mean in means.items()}, "epoch": self.current_epoch}
        for logger in self.loggers:
            logger.log_metrics(row, step=self.global_step - 1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Nothing: the TruncationEval callback scores every width on the batch."""

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (batch, classes) at the widest width, truncated as a device would run it."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        with bit_width(self, self.widths[0], "truncate"):
            return self(images).float().softmax(1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps how images reach the network beside the weights: whoever serves it has no data set to ask."""
        checkpoint["epoch_losses"] = dict(self._epoch_losses.state)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            checkpoint["preprocessing"] = {
                "input_size": list(data.input_shape),
                "mean": list(data.mean),
                "std": list(data.std),
                "interpolation": data.interpolation,
                "crop_pct": data.crop_pct,
                "classes": list(data.class_names),
            }

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.hparams.num_classes is not None:
            self.configure_model()  # load_from_checkpoint, ddp_spawn and ddp_fork load into a module that was never built
        return super().load_state_dict(*args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_epoch = checkpoint.get("epoch")
        self._epoch_losses.state = dict(checkpoint.get("epoch_losses", {}))
        # a schedule is a function of the configuration and of the step: with more epochs it has their length, where the
        # state of the shorter one would stay at its end
        checkpoint["lr_schedulers"] = []

    def on_train_start(self) -> None:
        for config in (
            self.trainer.lr_scheduler_configs
        ):  # the optimizer's state brought the rate of the run before
            self.lr_scheduler_step(config.scheduler, None)

    # -- optimisation ----------------------------------------------------------------------------------------------
    def configure_optimizers(self) -> Any:
        from tq_lightning.training.optim import build_optimizer, build_scheduler

        assert self.model is not None
        optimizer = build_optimizer(self.model, self.hparams)
        scheduler = build_scheduler(optimizer, self.hparams, self.trainer)
        if scheduler is None:
            return {"optimizer": optimizer}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # DDP's reducer fills in zeros for the norms of widths that took no part; a single process leaves them out, and so
        # momentum and weight decay do not move them
        for p in self._idle:
            p.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # now and not just before the next backward: the joint step sums its gradients up earlier than that
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)
