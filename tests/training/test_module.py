"""Teachers, loss weights and widths of a step, and one-line errors."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tq_lightning.errors import TrainingError, UserError
from tq_lightning.training import module as module_file
from tq_lightning.training.data_validation import check_against_data
from tq_lightning.training.joint import JointGradients
from tq_lightning.training.lists import as_ints, as_list
from tq_lightning.training.losses import bce, cross_entropy, distillation
from tq_lightning.training.module import TQModule
from tq_lightning.training.validation import check_fit_keys

LOGITS = {
    None: torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]]),
    8: torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    4: torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]]),
    2: torch.tensor([[0.0, 0.0, 0.5], [1.0, 0.0, 0.0]]),
    1: torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]),
}
OUTSIDE = torch.tensor([[3.0, -1.0, 0.0], [0.0, 2.0, -2.0]])
TARGET = torch.tensor([0, 1])


class ExternalTeacher(nn.Module):
    def forward(self, images):
        return OUTSIDE


def width_losses(monkeypatch, teacher_net=False, **arguments):
    """Return {width: loss} of a training step on `LOGITS`, and the arguments it passed on."""
    module = TQModule(**arguments)
    passed = {}

    def joint(model, images, widths, width_loss, weights, scale):
        seen, losses = {}, {}
        for bits in widths:
            losses[bits] = width_loss(bits, LOGITS[bits], dict(seen))
            seen[bits] = LOGITS[bits]
        passed.update(weights=weights, scale=scale, widths=widths)
        return JointGradients(torch.stack(list(losses.values())), torch.tensor(True), [], [])

    monkeypatch.setattr(module_file, "joint_gradients", joint)
    monkeypatch.setattr(module_file, "unused_parameters", lambda loss: [])
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    module._trainer = SimpleNamespace(fit_loop=loop, precision_plugin=SimpleNamespace())
    module.log = lambda *_, **__: None
    if teacher_net:
        module._teacher = [ExternalTeacher()]
    module.training_step((torch.zeros(2, 3, 8, 8), TARGET), 0)
    logged = module._epoch_losses.means()
    keys = {f"train/loss_{'float' if b is None else f'w{b}'}" for b in passed["widths"]}
    assert set(logged) == keys
    return {
        bits: logged[f"train/loss_{'float' if bits is None else f'w{bits}'}"].item()
        for bits in passed["widths"]
    }, passed


def close(value):
    return pytest.approx(value.item(), rel=1e-6)


def test_teacher_none_uses_only_labels(monkeypatch):
    losses, passed = width_losses(monkeypatch, teacher="none")
    assert losses == {b: close(cross_entropy(LOGITS[b], TARGET)) for b in (8, 4, 2, 1)}
    assert passed["weights"] == [1.0] * 4 and passed["scale"] == 1.0


def test_teacher_widest_is_the_widest_width(monkeypatch):
    losses, _ = width_losses(monkeypatch, teacher="widest")
    assert losses == {
        8: close(cross_entropy(LOGITS[8], TARGET)),
        **{b: close(distillation(LOGITS[b], LOGITS[8])) for b in (4, 2, 1)},
    }


def test_teacher_recursive_is_the_next_wider_width(monkeypatch):
    losses, _ = width_losses(monkeypatch)
    expected = {8: cross_entropy(LOGITS[8], TARGET)}
    expected |= {
        narrow: distillation(LOGITS[narrow], LOGITS[wide])
        for wide, narrow in ((8, 4), (4, 2), (2, 1))
    }
    assert losses == {b: close(v) for b, v in expected.items()}
    assert losses[1] != close(distillation(LOGITS[1], LOGITS[8]))  # recursive is not widest


def test_float_pass_is_the_teacher_of_the_widest(monkeypatch):
    losses, passed = width_losses(monkeypatch, float_pass=True, widths="8,2")
    assert passed["widths"] == (None, 8, 2)
    assert losses[None] == close(cross_entropy(LOGITS[None], TARGET))
    assert losses[8] == close(distillation(LOGITS[8], LOGITS[None]))
    assert losses[2] == close(distillation(LOGITS[2], LOGITS[8]))


def test_external_teacher_teaches_all_widths_or_the_widest(monkeypatch):
    losses, _ = width_losses(monkeypatch, True, teacher="external", teacher_name="resnet8_cifar")
    assert losses == {b: close(distillation(LOGITS[b], OUTSIDE)) for b in (8, 4, 2, 1)}
    losses, _ = width_losses(monkeypatch, True, teacher="recursive", teacher_name="resnet8_cifar")
    assert losses[8] == close(distillation(LOGITS[8], OUTSIDE))
    assert losses[4] == close(distillation(LOGITS[4], LOGITS[8]))


def test_distill_weight_and_temperature_are_used(monkeypatch):
    losses, _ = width_losses(
        monkeypatch, distill_weight=0.25, temperature=3.0, loss="bce", widths=[8, 4]
    )
    assert losses[8] == close(bce(LOGITS[8], TARGET))
    assert losses[4] == close(
        0.75 * bce(LOGITS[4], TARGET) + 0.25 * distillation(LOGITS[4], LOGITS[8], 3.0)
    )


def test_sandwich_keeps_the_loss_weight_of_each_width(monkeypatch):
    _, passed = width_losses(
        monkeypatch, width_weights="1, 0.5, 0.25, 2", width_schedule="sandwich", seed=3
    )
    by_width = dict(zip((8, 4, 2, 1), (1.0, 0.5, 0.25, 2.0), strict=True))
    assert passed["weights"] == [by_width[b] for b in passed["widths"]]
    assert len(passed["widths"]) == 3


def test_loss_weights_are_in_the_order_of_the_given_widths(monkeypatch):
    _, passed = width_losses(
        monkeypatch, widths="1,8,2", width_weights="3, 0.5, 2", float_pass=False
    )
    assert passed["widths"] == (8, 2, 1) and passed["weights"] == [0.5, 2.0, 3.0]
    _, passed = width_losses(
        monkeypatch, widths=[2, 8], width_weights=[0.25, 3.0, 0.5], float_pass=True
    )
    assert passed["widths"] == (None, 8, 2) and passed["weights"] == [0.25, 0.5, 3.0]


def test_sandwich_is_a_function_of_seed_and_step():
    module = TQModule(
        widths=[8, 7, 6, 5, 4, 3, 2, 1], width_schedule="sandwich", sandwich_random=2, seed=1
    )
    steps = [module.step_widths(step) for step in range(60)]
    assert steps == [module.step_widths(step) for step in range(60)]
    assert all(
        s[0] == 8 and s[-1] == 1 and len(s) == 4 and list(s) == sorted(s, reverse=True)
        for s in steps
    )
    assert {b for s in steps for b in s} == set(range(1, 9))
    other = TQModule(
        widths=[8, 7, 6, 5, 4, 3, 2, 1], width_schedule="sandwich", sandwich_random=2, seed=2
    )
    assert steps != [other.step_widths(step) for step in range(60)]
    assert TQModule(widths=[8, 1], width_schedule="sandwich").step_widths(0) == (8, 1)
    assert TQModule(widths=[8, 4, 1], width_schedule="sandwich", sandwich_random=9).step_widths(
        0
    ) == (8, 4, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "mse"}, "model.loss: got 'mse', pass one of cross_entropy, bce"),
        (
            {"teacher": "wide"},
            "model.teacher: got 'wide', pass one of none, widest, recursive, external",
        ),
        ({"width_schedule": "some"}, "model.width_schedule: got 'some', pass one of all, sandwich"),
        ({"teacher": "external"}, "pass model.teacher_name"),
        ({"distill_weight": 1.5}, "model.distill_weight: got 1.5"),
        ({"temperature": 0.0}, "model.temperature: got 0.0"),
        ({"width_weights": "1,2"}, "got 2 weights for 4 passes"),
        ({"width_weights": "1,2,x,4"}, "model.width_weights: got '1,2,x,4'"),
        ({"width_weights": [1, 2, -1, 4]}, "model.width_weights: got [1, 2, -1, 4], pass numbers"),
        ({"width_weights": 0, "widths": [8]}, "model.width_weights: got 0, pass numbers from 0"),
        ({"model_args": {"num_classes": 5}}, "got num_classes=5; pass model.num_classes"),
        ({"widths": "8,four"}, "model.widths: got '8,four', expected integers"),
        ({"widths": [9]}, "model.widths"),
        ({"widths": []}, "model.widths"),
        ({"ema_decay": 1.5}, "model.ema_decay: got 1.5"),
        ({"calibration_batches": 0}, "model.calibration_batches: got 0"),
        ({"sandwich_random": -1}, "model.sandwich_random: got -1"),
        ({"seed": -1}, "model.seed: got -1"),
        ({"quantizer": "flor"}, "unknown quantizer 'flor'; pass one of floor, round"),
        ({"norm": "none"}, "unknown norm 'none'; pass one of per_width"),
        ({"activations": "relu"}, "unknown activations 'relu'; pass null or one of"),
        ({"lr": -1.0}, "model.lr: got -1.0, pass a number from 0"),
        ({"lr": math.nan}, "model.lr: got nan"),
        ({"lr": math.inf}, "model.lr: got inf"),
        ({"momentum": 1.5}, "model.momentum: got 1.5"),
        ({"weight_decay": -1e-4}, "model.weight_decay: got -0.0001"),
        ({"warmup_epochs": -1}, "model.warmup_epochs: got -1"),
        ({"num_classes": 0}, "model.num_classes: got 0"),
        ({"opt": "sgdd"}, "model.opt: got 'sgdd'; did you mean sgd"),
        ({"opt": "adam", "opt_args": {"beta": 1}}, "model.opt_args: got {'beta': 1}, which adam"),
        ({"opt": "adamw", "opt_args": {"betas": [2, 3]}}, "model.opt_args: got {'betas': [2, 3]}"),
        ({"sched": "cosin"}, "poly, none; did you mean cosine?"),
        ({"sched": "plateau"}, "model.sched: got 'plateau'"),
        ({"decay_epochs": "1,two"}, "model.decay_epochs: got '1,two'"),
        ({"sched": "step", "decay_epochs": 0}, "model.decay_epochs: got 0, pass epochs above 0"),
        ({"sched": "multistep", "decay_epochs": "[]"}, "model.decay_epochs: got '[]', pass epochs"),
    ],
)
def test_invalid_value_is_an_error_that_names_the_key(arguments, message):
    with pytest.raises(UserError) as error:
        TQModule(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_lr": 0.1}, "model.min_lr: got 0.1, which is above model.lr=0.05"),
        ({"warmup_lr": 0.1, "warmup_epochs": 1}, "model.warmup_lr: got 0.1, which is above"),
        (
            {"sched": "step", "decay_epochs": "1,2"},
            "decay_epochs: got '1,2', but model.sched=step",
        ),
        ({"opt_args": {"lr": 1.0}}, "model.opt_args: got lr; pass it as model.lr instead"),
        ({"opt_args": {"weight_decay": 0}}, "model.opt_args: got weight_decay"),
        (
            {"width_schedule": "sandwich", "sandwich_random": 3},
            "model.sandwich_random: got 3, but there are 2 passes between",
        ),
        ({"teacher_checkpoint_path": "a.pth"}, "model.teacher_checkpoint_path: got a.pth, which"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_by_a_fit_only(arguments, message):
    module = TQModule(**arguments)  # of a checkpoint to test or export
    with pytest.raises(UserError) as error:
        check_fit_keys(module.hparams)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"lr": 1e-6},  # below the default of warmup_lr, without a warm-up
        {"min_lr": 0.1, "sched": "none"},
        {"sched": "multistep", "decay_epochs": "1,2"},
        {"width_schedule": "sandwich", "widths": [8, 1]},
        {"width_schedule": "sandwich", "sandwich_random": 3, "float_pass": True},
    ],
)
def test_defaults_and_valid_combinations_are_accepted_by_a_fit(arguments):
    check_fit_keys(TQModule(**arguments).hparams)


def test_fit_checks_its_keys_before_a_model_is_built(train, tmp_path):
    with pytest.raises(UserError, match=r"model\.min_lr: got 9, which is above model\.lr"):
        train(tmp_path, {"min_lr": 9.0, "sched": "cosine"})


def test_fit_on_one_class_is_refused():
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    with pytest.raises(UserError, match="the training data has 1 class; pass data with 2 or more"):
        check_against_data(TQModule().hparams, SimpleNamespace(num_classes=1), trainer)


@pytest.mark.parametrize("text", ["[8, 4", "8, 4]", "(8, 4]", "8,,4", ",8", "[8, [4]"])
def test_malformed_list_is_an_error(text):
    with pytest.raises(UserError, match=r"model\.widths: got .*, expected integers"):
        TQModule(widths=text)
    with pytest.raises(UserError, match=r"model\.skip: got .*, expected a list"):
        TQModule(skip=text)


def test_null_teacher_equals_none():
    module = TQModule(teacher=None)
    assert module.hparams.teacher == "none"


def test_lists_are_accepted_in_every_notation():
    assert as_list("8, 4") == ["8", "4"] and as_list("(8,)") == ["8"] and as_list(8) == [8]
    assert as_ints(("8", 4.0), "k") == [8, 4]
    assert as_list("layer[12].*, first") == ["layer[12].*", "first"] and as_list("[]") == []
    assert TQModule(widths="1,8,4").widths == TQModule(widths=[8, 4, 1]).widths == (8, 4, 1)


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategy_is_an_error_of_one_line(strategy):
    def trainer(name):
        return SimpleNamespace(
            strategy=type(name, (), {})(),
            precision_plugin=SimpleNamespace(),
            accumulate_grad_batches=1,
        )

    module = TQModule()
    module._trainer = trainer(strategy)
    with pytest.raises(UserError, match=f"{strategy} shards the weights.*pass ddp"):
        module.setup("fit")
    module._trainer = trainer("DDPStrategy")
    module.setup("fit")


def test_external_teacher_is_used_in_a_fit_and_not_saved(train, resnet, tmp_path):
    from tq_lightning.models import create_model

    teacher = create_model("resnet8_cifar", num_classes=10)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    arguments = {
        "teacher": "external",
        "teacher_name": "resnet8_cifar",
        "teacher_checkpoint_path": str(tmp_path / "teacher.pth"),
    }
    trainer, module = train(tmp_path, model=arguments)
    assert not any("teacher" in key for key in module.state_dict())
    kept = module._teacher[0]
    assert not kept.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(kept.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["teacher"] == "external"
    (tmp_path / "teacher.pth").unlink()  # evaluating a student needs no teacher
    again = TQModule(**{**module.hparams, "checkpoint_path": None})
    trainer.validate(again, trainer.datamodule)
    assert again._teacher == []


def test_teacher_with_other_classes_is_an_error_before_a_download(train, tmp_path):
    with pytest.raises(
        UserError,
        match=r"resnet18 have 1000 classes, the data has 10; "
        r"pass model\.teacher_checkpoint_path",
    ):
        train(tmp_path, {"teacher": "external", "teacher_name": "resnet18"})


def test_teacher_errors_name_the_teacher(train, tmp_path):
    with pytest.raises(
        UserError, match=r"^the teacher .*: cannot load the pretrained weights of resnet8_cifar"
    ):
        train(tmp_path, {"teacher": "external", "teacher_name": "resnet8_cifar"})


def test_non_finite_loss_error_names_step_width_and_rate(train, tmp_path, monkeypatch):
    calls = []

    def hard(logits, target):
        calls.append(None)
        return cross_entropy(logits, target) * (math.nan if len(calls) > 2 else 1.0)

    monkeypatch.setitem(module_file.LOSSES, "cross_entropy", hard)
    with pytest.raises(
        TrainingError, match=r"step 2: loss is not finite at width 8 \(learning rate 0.1\)"
    ):
        train(tmp_path, limit_train_batches=4)


def test_nan_weight_error_names_step_and_layer(train, tmp_path):
    import lightning as L

    class Break(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                pl_module.model.blocks[0].mlp.fc1.parametrizations.weight.original.data[0, 0] = (
                    math.nan
                )

    with pytest.raises(
        TrainingError,
        match=r"step 1: .*blocks.0.mlp.fc1.weight contains NaN.*learning rate 0.1",
    ):
        train(tmp_path, callbacks=[Break()])


def test_validation_draws_no_random_numbers():
    """Weights are initialized after the checks, so a draw in the checks would change every run."""
    before = torch.get_rng_state()
    TQModule(opt="sgd", num_classes=10)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_size_that_the_network_refuses_is_one_line():
    """Only before the first forward pass: later errors have another cause."""
    size = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 1}
    module = TQModule(name="vit_tiny_patch16_224", num_classes=2, model_args=size)
    module.configure_model()
    with pytest.raises(UserError, match=r"shape \(2, 3, 8, 8\) .*pass another data\.image_size"):
        module(torch.zeros(2, 3, 8, 8))
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    with pytest.raises(AssertionError):
        module(torch.zeros(2, 3, 8, 8))
