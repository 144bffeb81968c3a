"""Trainer flags with the joint step: clipping, accumulation, bf16, EMA, optimizers, schedules."""

import math
from types import SimpleNamespace
from unittest import mock

import lightning as L
import pytest
import torch

from tq_lightning.errors import UserError
from tq_lightning.quant import fused_weights
from tq_lightning.quant.norm_calibration import calibrate_norms, reestimate_norms
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.training.checkpoint import load_checkpoint_model
from tq_lightning.training.optim import build_optimizer, build_scheduler


class RecordWeights(L.Callback):
    """Keep a copy of all tensors before the first and after every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append({k: v.detach().clone() for k, v in pl_module.state_dict().items()})


def moved(before, after, parameters):
    return math.sqrt(sum((after[k] - before[k]).square().sum().item() for k in parameters))


def test_clipped_gradient_sets_the_length_of_a_step(train, tmp_path):
    """At learning rate 1, a step of plain SGD has the norm of the clipped gradient."""
    lengths = {}
    for clip in (None, 0.01):
        weights = RecordWeights()
        _, module = train(
            tmp_path,
            {"lr": 1.0},
            callbacks=[weights],
            limit_train_batches=1,
            gradient_clip_val=clip,
        )
        names = [k for k, p in module.named_parameters() if p.requires_grad]
        lengths[clip] = moved(weights.seen[0], weights.seen[1], names)
    assert lengths[0.01] == pytest.approx(0.01, rel=1e-3)
    assert lengths[None] > 0.1


def test_accumulation_equals_a_larger_batch(train, tmp_path):
    """Two accumulated batches of 8 give the step of a batch of 16. One batch does not."""
    _, whole = train(tmp_path, data={"batch_size": 16}, limit_train_batches=2)
    trainer, halves = train(
        tmp_path, data={"batch_size": 8}, limit_train_batches=4, accumulate_grad_batches=2
    )
    _, alone = train(tmp_path, data={"batch_size": 8}, limit_train_batches=2)
    assert trainer.global_step == 2
    for (name, p), q in zip(whole.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    far = max(
        (p - q).abs().max().item()
        for p, q in zip(whole.parameters(), alone.parameters(), strict=True)
    )
    assert far > 1e-3


def test_gradients_are_none_after_the_step(train, tmp_path):
    """The joint step sums gradients outside .grad; those of the previous step must not be added."""

    class NoGradients(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert all(p.grad is None for p in pl_module.parameters())

    train(tmp_path, callbacks=[NoGradients()], limit_train_batches=3)


@pytest.mark.parametrize("convolutions", [False, True])
def test_bf16_keeps_codes_and_gradients_in_float32(
    train, resnet, tmp_path, monkeypatch, convolutions
):
    model = resnet if convolutions else {}
    kinds = set()
    plain = fused_weights.dequantize

    def spy(codes, bits, scale, level, out, table):
        kinds.update((scale.dtype, out.dtype))
        assert codes.dtype == torch.uint8
        return plain(codes, bits, scale, level, out, table=table)

    monkeypatch.setattr(fused_weights, "dequantize", spy)

    class Grads(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            assert grads and all(
                g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads
            )

    weights = RecordWeights()
    trainer, module = train(tmp_path, model, callbacks=[weights, Grads()], precision="bf16-mixed")
    assert kinds == {torch.float32}
    assert math.isfinite(trainer.callback_metrics["train/loss_w1"].item())
    names = [k for k, p in module.named_parameters() if p.requires_grad]
    assert moved(weights.seen[0], weights.seen[-1], names) > 0
    train(tmp_path, model, callbacks=[exact := RecordWeights()])
    assert any(not torch.equal(weights.seen[-1][k], exact.seen[-1][k]) for k in names), (
        "bf16 was not in use"
    )


@mock.patch("tq_lightning.quant.norm_calibration.SETTLED", 0)
def test_moving_average_is_evaluated_and_saved(train, resnet, tmp_path):
    """The checkpoint holds the average, its estimated norms, and the current weights."""
    weights, decay = RecordWeights(), 0.6
    trainer, _ = train(
        tmp_path,
        {**resnet, "ema_decay": decay},
        callbacks=[weights],
        limit_train_batches=4,
        max_epochs=2,
    )  # 8 steps
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    expected = dict(weights.seen[1])
    for seen in weights.seen[2:]:
        expected = {
            k: decay * v + (1 - decay) * seen[k] if v.is_floating_point() else seen[k]
            for k, v in expected.items()
        }
    assert len(weights.seen) == 9
    estimated = tuple(f".sets.{b}." for b in (7, 6, 5, 3)) + (".sets.none.",)
    for key, value in expected.items():
        if not any(part in key for part in estimated) and not key.endswith("calibrated"):
            torch.testing.assert_close(
                average[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
    assert any(
        not torch.allclose(average[k], weights.seen[-1][k]) for k in average
    )  # the average, not the last weights
    assert current.keys() == average.keys()

    model, _, _ = load_checkpoint_model(tmp_path / "end.ckpt")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(bool(norm.calibrated[b]) for norm in per_width_norms(model) for b in (7, 6, 5, 3))
    calibrate_norms(model, [images for images, _ in trainer.datamodule.calibration_batches(1)])
    for key, value in model.state_dict().items():
        torch.testing.assert_close(
            value, before[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_short_run_is_evaluated_with_estimated_statistics(train, resnet, tmp_path):
    """Running averages of two steps are close to their initial values 0 and 1."""

    def stem(module):
        return per_width_norms(module)[0].sets["4"]

    trainer, module = train(tmp_path, resnet)
    scored = stem(module).running_var.clone()
    assert stem(module).num_batches_tracked == 2  # the updates of training
    batches = [images for images, _ in trainer.datamodule.calibration_batches(1)]
    reestimate_norms(module, batches, [4])
    assert torch.allclose(scored, stem(module).running_var)
    with mock.patch("tq_lightning.quant.norm_calibration.SETTLED", 2):
        _, raw = train(tmp_path, resnet)
    assert (stem(raw).running_var - scored).abs().min() > 0.5


def test_validation_does_not_change_the_average_of_weights(train, tmp_path):
    """Validation swaps the average in and out without changing the current weights."""
    with_average, without = RecordWeights(), RecordWeights()
    train(tmp_path, {"ema_decay": 0.5}, callbacks=[with_average], max_epochs=2)
    train(tmp_path, callbacks=[without], max_epochs=2)
    for one, two in zip(with_average.seen, without.seen, strict=True):
        assert all(torch.equal(one[k], two[k]) for k in two if not k.endswith("calibrated"))


# -- optimizers and schedules
# --------------------------------------------------------------------------------------------
def optimizer_arguments(**changes):
    plain = {
        "opt": "sgd",
        "lr": 0.5,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "opt_args": None,
        "sched": "cosine",
    }
    plain |= {
        "warmup_epochs": 0.0,
        "warmup_lr": 0.0,
        "min_lr": 0.0,
        "decay_epochs": 30.0,
        "decay_rate": 0.1,
    }
    return SimpleNamespace(**{**plain, **changes})


def learning_rates(batches=10, steps=40, accumulate=1, fast_dev_run=0, **changes):
    """Return the learning rate of every step of a run."""
    h = optimizer_arguments(**changes)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), h)
    trainer = SimpleNamespace(
        estimated_stepping_batches=steps,
        num_training_batches=batches,
        accumulate_grad_batches=accumulate,
        fast_dev_run=fast_dev_run,
    )
    scheduler = build_scheduler(optimizer, h, trainer)
    out = []
    for step in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step_update(num_updates=step + 1)
    return out


def test_cosine_schedule_ends_with_the_run():
    got = learning_rates()
    assert got == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 40)) for t in range(40)])
    short = learning_rates(steps=7)  # trainer.max_steps inside the first epoch
    assert short == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 7)) for t in range(7)])


def test_warm_up_and_decay_count_epochs_of_updates():
    got = learning_rates(sched="multistep", decay_epochs="1,3", warmup_epochs=0.5)
    assert got[:5] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert got[5:9] == pytest.approx([0.5] * 4)  # timm is one update ahead
    assert got[10:29] == pytest.approx([0.05] * 19) and got[30:] == pytest.approx([0.005] * 10)
    halved = learning_rates(
        batches=20, accumulate=2, sched="multistep", decay_epochs=[1, 3], warmup_epochs=0.5
    )
    assert halved == pytest.approx(got)


def test_warm_up_ends_with_the_training_at_the_latest():
    """Also if trainer.max_steps ends it; a trial run with fast_dev_run may stop in the warm-up."""
    with pytest.raises(UserError, match=r"warmup_epochs: got 0.8, which is 8 steps, but .* 7 \("):
        learning_rates(steps=7, warmup_epochs=0.8)
    assert learning_rates(steps=8, warmup_epochs=0.8)[0] == 0
    assert learning_rates(steps=1, warmup_epochs=0.8, fast_dev_run=1) == [0]


@pytest.mark.parametrize("sched", ["step", "multistep"])
def test_a_decay_comes_before_the_end_of_the_training(sched):
    with pytest.raises(UserError, match=r"decay_epochs: got \[4.0\], but .* after 4 epochs"):
        learning_rates(sched=sched, decay_epochs=4)
    assert learning_rates(sched=sched, decay_epochs=3.8)[-1] == pytest.approx(0.05)
    assert learning_rates(steps=1, sched=sched, fast_dev_run=1) == [0.5]


def test_milestones_may_be_in_any_order():
    one = learning_rates(sched="multistep", decay_epochs="1,2,3")
    assert learning_rates(sched="multistep", decay_epochs="3,1,2") == one


@pytest.mark.parametrize("sched", ["tanh", "poly", "step"])
def test_other_schedules_decrease_the_rate(sched):
    got = learning_rates(sched=sched, decay_epochs=1, decay_rate=1.0 if sched == "poly" else 0.1)
    assert got[0] == pytest.approx(0.5, rel=0.01) and got[-1] < 0.05
    assert learning_rates(sched="none") == [0.5] * 40


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adam", "adamw", "lamb", "lion", "rmsprop"])
def test_every_optimizer_steps_and_excludes_biases_from_decay(opt):
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, optimizer_arguments(opt=opt))
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decays[id(model.weight)] > 0 and decays[id(model.bias)] == 0
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_sgd_without_momentum_and_opt_args_are_passed_on():
    group = build_optimizer(torch.nn.Linear(2, 2), optimizer_arguments(momentum=0.0)).param_groups[
        0
    ]
    assert group["momentum"] == 0 and not group["nesterov"]
    assert build_optimizer(torch.nn.Linear(2, 2), optimizer_arguments()).param_groups[0]["nesterov"]
    betas = build_optimizer(
        torch.nn.Linear(2, 2), optimizer_arguments(opt="adamw", opt_args={"betas": [0.8, 0.9]})
    ).param_groups[0]["betas"]
    assert tuple(betas) == (0.8, 0.9)


def test_model_can_exclude_parameters_from_decay(train, tmp_path):
    trainer, module = train(tmp_path, {"weight_decay": 0.1}, limit_train_batches=1)
    decays = {
        id(p): g["weight_decay"] for g in trainer.optimizers[0].param_groups for p in g["params"]
    }
    assert decays[id(module.model.pos_embed)] == 0.0 and decays[id(module.model.cls_token)] == 0.0
    assert decays[id(module.model.blocks[0].mlp.fc1.parametrizations.weight.original)] == 0.1


def test_schedule_without_an_end_is_an_error():
    with pytest.raises(UserError, match=r"model\.sched: the schedule needs an end; pass trainer"):
        learning_rates(steps=math.inf)
