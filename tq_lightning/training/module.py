"""TQModule: the LightningModule that trains a timm model jointly at several bit widths."""

import random
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.data.sampling import run_seed
from tq_lightning.errors import TrainingError, UserError
from tq_lightning.factories import is_factory, only_allow
from tq_lightning.models.weights import check_fit
from tq_lightning.quant.batches import call_model, samples_of, split_batch
from tq_lightning.quant.bit_width import bit_width
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.fused_weights import FusedModel, fused_weights
from tq_lightning.quant.input_spec import check_arguments, describe_inputs
from tq_lightning.quant.label_checks import check_labels_are_shifted
from tq_lightning.quant.prepare import PrepareReport, apply_config
from tq_lightning.quant.switchable_norm import train_float_norms
from tq_lightning.training import factory
from tq_lightning.training.compiling import check_compiler, compiled
from tq_lightning.training.data_validation import check_against_data, refused_shape
from tq_lightning.training.epoch_losses import EpochLosses
from tq_lightning.training.joint import JointGradients, joint_gradients, loss_with_gradients
from tq_lightning.training.lists import as_ints
from tq_lightning.training.losses import LOSSES, make_width_loss, with_label_checks
from tq_lightning.training.optim import check_restored_state, optimizer_and_schedule
from tq_lightning.training.precomputed_gradients import unused_parameters
from tq_lightning.training.preprocessing import export_fields, report_other_classes
from tq_lightning.training.resume_guard import check_batches, check_resume
from tq_lightning.training.run_callbacks import module_callbacks
from tq_lightning.training.step_graph import StepGraphs, check_cuda_graph
from tq_lightning.training.sync_batchnorm import use_timm_sync_batchnorm
from tq_lightning.training.trainer_validation import check_trainer
from tq_lightning.training.validation import (
    check_fit_keys,
    check_hparams,
    naming_model_keys,
    pass_weights,
    quant_choices,
)
from tq_lightning.training.width_schedules import WIDTH_SCHEDULES


def width_key(bits: int | None) -> str:
    """Return the name of a width in metric keys: w4, or float."""
    return "float" if bits is None else f"w{bits}"


class TQModule(L.LightningModule):
    """A timm model with fake quantizers, trained jointly at `widths`.

    The signature is the `model:` section of a configuration.

    Args:
        name: a timm model; resnet8_cifar, resnet20_cifar, resnet56_cifar or preresnet20_cifar; or
            package.module:factory, your own function that returns the network.
        pretrained: start from timm's pretrained weights (downloads them).
        checkpoint_path: file of float weights to start from.
        num_classes: outputs of the classifier; null for the classes of the data set.
        model_args: further arguments of the model, e.g. {expansion: 5} or {img_size: 32}.
        drop_rate: dropout before the classifier; null for the model's default.
        drop_path_rate: stochastic depth; null for the model's default.
        quantizer: floor (TruncQuant) or round (baseline).
        ste: auto, identity, scaled, slope, clipped, ewgs, dsq or value; auto is scaled for floor,
            identity for round and for a learned range, value for non-uniform codes.
        level: endpoint, left or centre; for non-uniform codes centroid or native.
        normalizer: tanh, tanh_channel, absmax, absmax_channel, learned or learned_channel; for
            non-uniform codes gaussian, float_e2, mu_law or log.
        scale: weight at level 1, mean (the mean magnitude) or span (the largest weight that the
            normalizer represents, which preserves values).
        quantize_embeddings: quantize embedding tables too.
        widths: trained bit widths, e.g. 8,4,2,1.
        max_bits: stored bit width.
        activations: null, or clamp_round, clamp_floor, pact_round, pact_floor, each also with
            _truncate.
        skip: layers left in float: first, last, and name patterns.
        norm: per_width, per_width_all (layer norms too) or shared.
        shared_norms: patterns of norms that all widths share, e.g. `["*skip_bn"]`.
        task: classification (one label per sample, metrics acc1) or language_modeling (one label
            per token, metrics ppl).
        loss: label loss, cross_entropy or bce.
        teacher: teacher of the narrower widths: recursive (the next wider width), widest, external,
            or none (labels only; null is none).
        teacher_name: external teacher, a timm model; the teacher of the widest width, or of all
            widths with teacher=external.
        teacher_checkpoint_path: its weights; null for timm's pretrained weights.
        distill_weight: weight w of the distillation loss; the label loss has weight 1 - w.
        temperature: temperature of the distillation.
        float_pass: also train a float pass (bits=None), before the widths: true (float weights), or
            normalized (normalized weights that are not quantized, plain ReLUs).
        width_schedule: all, or sandwich (widest, narrowest and `sandwich_random` others per step).
        sandwich_random: random widths per step of the sandwich.
        width_weights: weight of each width's loss, in the order of `widths` (the float pass first);
            null is 1 for each.
        opt: name of a timm optimizer (sgd, adam, adamw, lamb, ...).
        lr: peak learning rate.
        weight_decay: weight decay.
        momentum: momentum of sgd and similar optimizers.
        opt_args: further arguments of the optimizer, e.g. {betas: [0.9, 0.95]}.
        sched: learning-rate schedule, stepped every update: cosine, step, multistep, poly, tanh or
            none.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of cosine and poly.
        decay_epochs: epochs between decays (step), or the epochs of the decays (multistep), e.g.
            100,150,180.
        decay_rate: factor of a decay; power of poly.
        ema_decay: decay of an exponential moving average of the weights, which is then evaluated
            and saved; null for none.
        calibration_batches: training batches for estimating the norm statistics of untrained
            widths.
        channels_last: use the channels_last memory format, which is faster on most devices.
        compile: run the model through torch.compile, with one graph for all widths.
        compile_mode: mode of torch.compile: default, reduce-overhead (CUDA graphs, for small
            networks on a GPU), max-autotune or max-autotune-no-cudagraphs.
        cuda_graph: record the joint step, all widths forward and backward, as one CUDA graph, for
            small networks on a GPU.
        seed: seed of the width schedule and of the random state of each step; null for the seed of
            the run.
    """

    hparams: Any  # type: ignore[assignment]  # an AttributeDict; Lightning annotates a mapping

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
        scale: str = "mean",
        quantize_embeddings: bool = False,
        widths: list[int] | int | str = [8, 4, 2, 1],  # noqa: B006
        max_bits: int = 8,
        activations: str | None = None,
        skip: list[str] | str = ["first", "last"],  # noqa: B006
        norm: str = "per_width",
        shared_norms: list[str] | str = [],  # noqa: B006
        task: str = "classification",
        loss: str = "cross_entropy",
        teacher: str | None = "recursive",
        teacher_name: str | None = None,
        teacher_checkpoint_path: str | None = None,
        distill_weight: float = 1.0,
        temperature: float = 1.0,
        float_pass: bool | str = False,
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
        compile_mode: str = "default",
        cuda_graph: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.teacher = self.hparams.teacher or "none"
        check_hparams(self.hparams)
        choices = quant_choices(self.hparams)
        with naming_model_keys(self.hparams):
            self.quant = QuantConfig.from_mapping(choices)
        self.widths = self.quant.widths
        float_first: tuple[None, ...] = (None,) if float_pass else ()
        self.passes: tuple[int | None, ...] = float_first + self.widths
        # width_weights follow the order of the widths as given, not sorted
        self.width_weights = pass_weights(
            width_weights, (*float_first, *as_ints(widths, "model.widths"))
        )
        self.model: nn.Module | None = None
        self.report: PrepareReport | None = None
        # lists hide the teacher and the compiled model from parameters(), state_dict(), checkpoints
        self._teacher: list[nn.Module] = []
        self._compiled: list[Any] = []
        self.fused_model: FusedModel | None = None
        """Weights of a width, kept by `fused_weights` between the steps of a fit."""
        self._step_graphs: StepGraphs | None = None
        self._unused: list[nn.Parameter] = []
        self._inputs: list[dict[str, Any]] = []  # of a network of other inputs than images
        self._epoch_losses = EpochLosses()
        self.loaded_epoch: int | None = None
        self.restored_from_checkpoint = False
        """True if a checkpoint will be loaded, so that no pretrained weights are needed."""
        self.resumed_batches: dict[str, Any] | None = None
        """Loader state of the checkpoint to resume, if it was written within an epoch."""
        self._ran = False  # True after the first forward pass
        self.began = False
        """True once the loop runs, after a checkpoint, if any, has been loaded."""

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks of every run."""
        return module_callbacks(self.hparams)

    def setup(self, stage: str) -> None:
        """Check the Trainer and the data before a model is built."""
        check_trainer(self.trainer)
        if stage == "fit":
            check_fit_keys(self.hparams)
        if self.hparams.compile:
            check_compiler(self.trainer.strategy.root_device)
        if self.hparams.cuda_graph and stage == "fit":
            check_cuda_graph(self.trainer, self.hparams)
            self._step_graphs = StepGraphs()
        use_timm_sync_batchnorm(self.trainer)
        data = self._datamodule
        if data is not None:
            check_against_data(self.hparams, data, self.trainer)
            if stage == "fit":
                check_batches(self.resumed_batches, data)

    @property
    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    @property
    def _fits(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == "fit"

    # -- model -----------------------------------------------------------------------------------
    def configure_model(self) -> None:
        """Build and prepare the model once; a null num_classes is taken from the data."""
        if self.model is not None:
            return
        hparams = self.hparams
        if hparams.num_classes is None:
            hparams.num_classes = factory.classes_of_data(hparams.name, self._datamodule)
        if self._fits:
            factory.check_teacher(hparams)
        self.attach(factory.build_model(hparams, start_weights=not self.restored_from_checkpoint))
        if self._fits:
            teacher = factory.build_teacher(hparams)
            self._teacher = [] if teacher is None else [teacher]

    def attach(self, model: nn.Module) -> None:
        """Prepare `model` with the hyperparameters and make it the model of this module.

        Raises:
            UserError: a layer that can't be quantized, or a pattern that matches no layer.
        """
        try:
            self.report = apply_config(model, self.quant)
        except ValueError as error:
            raise UserError(f"model: {error}") from None
        if self.hparams.float_pass:
            train_float_norms(model)
        if self.hparams.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.fused_model = None
        if self.hparams.compile:
            self._compiled = [compiled(model, self.hparams.compile_mode)]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return logits (batch, classes) of images (batch, channels, height, width).

        Other networks take their own arguments; a language model returns logits (batch, tokens,
        vocabulary). The model runs at the bit width in use.

        Raises:
            UserError: the model cannot process inputs of this shape, or takes other arguments.
        """
        assert self.model is not None
        image = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None
        images = image is not None and image.dim() == 4
        if self.hparams.channels_last and images:
            inputs = (inputs[0].contiguous(memory_format=torch.channels_last),)
        try:
            outputs = self.compiled_model(*inputs, **named)
        except TypeError:
            check_arguments(self.model, inputs, named)
            raise
        except (AssertionError, RuntimeError) as error:
            first = images and not (self._ran or self._compiled)
            # a factory is the user's code, whose errors need their traceback
            other = is_factory(self.hparams.name) or isinstance(error, torch.OutOfMemoryError)
            if not first or other:
                raise
            raise refused_shape(self.hparams.name, inputs[0], error) from error
        self._ran = True
        return outputs

    @property
    def classes_are_known(self) -> bool:
        """True if the labels were compared with the number of classes when the data was read.

        This is not the case for the data sets of a user's factory.
        """
        return isinstance(self._datamodule, TQDataModule)

    @property
    def compiled_model(self) -> Any:
        """The network that runs: the compiled one with `compile`, which shares its parameters."""
        return self._compiled[0] if self._compiled else self.model

    # -- joint step ------------------------------------------------------------------------------
    def step_widths(self, step: int) -> tuple[int | None, ...]:
        """Return the passes of a step, widest first.

        They depend only on the seed and the step, so a resumed run repeats them.
        """
        hparams, rng = self.hparams, random.Random(f"{self.run_seed}-{step}")
        return WIDTH_SCHEDULES[hparams.width_schedule](self.passes, hparams.sandwich_random, rng)

    @property
    def run_seed(self) -> int:
        """Seed of the random state of each step: `seed`, else `seed_everything`, else 0."""
        if self.hparams.seed is not None:
            return self.hparams.seed
        return run_seed()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the joint loss of a batch: (inputs, labels), see `quant.batches.split_batch`.

        Raises:
            UserError: logits or labels do not fit the task.
            TrainingError: a loss is not finite.
        """
        inputs, target = split_batch(batch)
        hparams = self.hparams
        if not self._inputs and self.model is not None:
            self._inputs = describe_inputs(self.model, inputs)
        passes = self.step_widths(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        external = None
        if self._teacher:
            with torch.no_grad():
                external = call_model(self._teacher[0].to(self.device), inputs)
        if hparams.task == "language_modeling" and batch_idx == 0:
            check_labels_are_shifted(inputs, target)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        weights = [self.width_weights[b] for b in passes]
        # a GPU would fail without naming the label
        read_labels = batch_idx == 0 and not self.classes_are_known

        def gradients(tensors: tuple[Any, Tensor, Tensor | None]) -> JointGradients:
            inputs, target, external = tensors
            width_loss = make_width_loss(
                LOSSES[hparams.loss],
                target,
                hparams.teacher,
                external,
                hparams.distill_weight,
                hparams.temperature,
            )
            width_loss = with_label_checks(width_loss, hparams.task, target, read_labels)
            return joint_gradients(self, inputs, passes, width_loss, weights, scale)

        tensors = (inputs, target, external)
        try:
            if self._step_graphs is None or read_labels:
                step = gradients(tensors)
            else:
                step = self._step_graphs(self, (passes, *weights), gradients, tensors)
            loss, losses = loss_with_gradients(self, step, passes, weights)
        except UserError:
            raise
        except (TrainingError, ValueError, IndexError) as error:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise TrainingError(
                f"step {self.global_step}: {error} (learning rate {lr:g})"
            ) from None
        self._unused = [p for p in unused_parameters(loss) if p.grad is None]
        values = {f"train/loss_{width_key(b)}": value for b, value in losses.items()}
        if batch_idx == 0:
            self._epoch_losses.reset()
        self._epoch_losses.add(values, samples_of(inputs))
        self.log(
            "train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, logger=False
        )
        return loss

    def train_losses(self) -> dict[str, Tensor]:
        """Return the mean losses of the epoch so far, over all ranks, by metric key."""
        strategy = self.trainer.strategy
        return self._epoch_losses.means(lambda sums: strategy.reduce(sums, reduce_op="sum"))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: the TruncationEval callback evaluates every width on the batch."""

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return class probabilities (batch, classes) at the widest trained width, truncated.

        Raises:
            UserError: the network is a language model.
        """
        if self.hparams.task != "classification":
            raise UserError(
                f"predict writes class probabilities, which model.task={self.hparams.task} does "
                "not have; load the network with TQModule.load_from_checkpoint to generate text"
            )
        inputs = batch if isinstance(batch, Tensor) else split_batch(batch)[0]
        with fused_weights(self), bit_width(self, self.widths[0], "truncate"):
            return call_model(self, inputs).float().softmax(1)

    # -- checkpoints -----------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the losses of the epoch, and what `export` needs: preprocessing, classes, inputs."""
        gather = self.trainer.strategy.all_gather
        checkpoint["epoch_losses"] = self._epoch_losses.state_dict(
            lambda sums: gather(sums).view(-1, *sums.shape)
        )
        checkpoint |= export_fields(self._datamodule, self._inputs)

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, *args: Any, name: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint like Lightning. If it names a factory, pass the same `name`."""
        given = kwargs if name is None else {**kwargs, "name": name}
        with only_allow(name, checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **given)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict, after building the model if necessary."""
        if self.hparams.num_classes is not None:
            self.configure_model()
        return super().load_state_dict(*args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and restore the epoch's losses."""
        for key in ("state_dict", "current_model_state"):  # the latter with a moving average
            if self.model is not None and key in checkpoint:
                check_fit(checkpoint[key], self, "the checkpoint", "its own configuration")
        if self._fits:
            check_resume(checkpoint, self._datamodule)
        report_other_classes(checkpoint, self._datamodule)
        self.loaded_epoch = checkpoint.get("epoch")
        self._inputs = checkpoint.get("inputs", [])
        place = (self.global_rank, self.trainer.world_size) if self._trainer else (0, 1)
        self._epoch_losses.load_state_dict(checkpoint.get("epoch_losses", {}), *place)
        # The schedule follows from the configuration and the step. The saved state would end it
        # where the earlier run ended, even if this run has more epochs.
        checkpoint["lr_schedulers"] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which computes its own weights."""
        return {**super().__getstate__(), "fused_model": None, "_step_graphs": None}

    # -- start of a loop -------------------------------------------------------------------------
    def on_train_start(self) -> None:
        """Set the learning rate of this step, because the optimizer state has the earlier one."""
        for optimizer in self.trainer.optimizers:
            check_restored_state(optimizer)
        self.began = True
        for config in self.trainer.lr_scheduler_configs:
            self.lr_scheduler_step(config.scheduler, None)

    def on_train_epoch_start(self) -> None:
        """Forget the kept weights if a callback has changed the model."""
        self.drop_stale_weights()

    def drop_stale_weights(self) -> None:
        """Forget the kept weights of a model whose modules have changed since."""
        if self.fused_model is not None and not self.fused_model.describes(self):
            self.fused_model = None

    def teardown(self, stage: str) -> None:
        """Free the kept weights and graphs, which the Trainer does not move to the CPU."""
        self.fused_model = self._step_graphs = None

    def on_validation_start(self) -> None:
        """Record that the loop runs."""
        self.began = True

    on_test_start = on_predict_start = on_validation_start

    # -- optimization ----------------------------------------------------------------------------
    def configure_optimizers(self) -> Any:
        """Create timm's optimizer and schedule."""
        assert self.model is not None
        return optimizer_and_schedule(self.model, self.hparams, self.trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the zero gradients that DDP's reducer assigns to the norms of unused widths.

        Momentum and weight decay would change these norms. A single process has no such gradients.
        """
        for p in self._unused:
            p.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step, then free the gradients: the next joint step sums its gradients separately."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's schedule, which counts optimizer updates."""
        scheduler.step_update(num_updates=self.global_step)
