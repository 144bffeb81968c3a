"""Joint steps recorded as CUDA graphs, with a recorder that a CPU has too."""

import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.training import module as module_file
from tq_lightning.training import step_graph
from tq_lightning.training.step_graph import WARM_UP_STEPS, check_cuda_graph


class Recorder:
    """Like `CudaGraphs`: recording changes no values, and a replay writes to the same tensors."""

    model = None

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def record(self, function):
        self.recorded += 1
        buffers = {t: t.clone() for t in self.model.buffers()}
        with torch.random.fork_rng():
            results = function()
        for tensor, before in buffers.items():
            tensor.copy_(before)
        outputs = [results.losses, results.finite, *(g for g in results.grads if g is not None)]
        for output in outputs:  # a recorded function has not run yet
            output.zero_()

        def replay():
            self.replayed += 1
            now = function()
            values = [now.losses, now.finite, *(g for g in now.grads if g is not None)]
            for output, value in zip(outputs, values, strict=True):
                output.copy_(value)

        return results, replay


@pytest.fixture
def recorder(monkeypatch):
    """Record steps of a fit on the CPU."""
    recorder = Recorder()

    def check(trainer, hparams):
        recorder.model = trainer.lightning_module

    monkeypatch.setattr(module_file, "check_cuda_graph", check)
    monkeypatch.setattr(step_graph, "CudaGraphs", lambda: recorder)
    return recorder


def weights(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


class Freeze(L.Callback):
    """Freeze a layer, or switch a norm to evaluation mode, before a step."""

    def __init__(self, what):
        self.what = what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == WARM_UP_STEPS + 2:
            if self.what == "layer":
                pl_module.model.conv1.requires_grad_(False)
            else:
                pl_module.model.layer1.eval()


FLAGS = {"limit_train_batches": 8, "max_epochs": 2}


RUNS = {
    "plain": ({}, {}, 1),
    "float pass": ({"name": "resnet8_cifar", "model_args": {}, "float_pass": True}, {}, 1),
    "average, accumulation, clipping": (
        {"ema_decay": 0.5},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
        1,
    ),
    "learned range, weights": (
        {"normalizer": "learned", "level": "centre", "scale": "span", "width_weights": "1,1,.7,.3"},
        {},
        1,
    ),
    "dropout": ({"drop_rate": 0.2, "teacher": "widest", "distill_weight": 0.5}, {}, 1),
    "sandwich": ({"width_schedule": "sandwich"}, {}, 2),
    "teacher": (
        {
            "teacher": "external",
            "teacher_name": "resnet8_cifar",
            "teacher_checkpoint_path": "teacher.th",
        },
        {},
        1,
    ),
}
FAST = ("average, accumulation, clipping", "sandwich", "teacher")


@pytest.mark.parametrize(
    ("how", "flags", "kinds"),
    [
        pytest.param(*run, id=name, marks=[] if name in FAST else [pytest.mark.slow])
        for name, run in RUNS.items()
    ],
)
def test_recorded_steps_train_the_same_weights(
    train, tmp_path, recorder, monkeypatch, how, flags, kinds
):
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("resnet8_cifar", num_classes=10).state_dict(), "teacher.th")
    _, plain = train(tmp_path, how, **{**FLAGS, **flags})
    trainer, graphed = train(tmp_path, {**how, "cuda_graph": True}, **{**FLAGS, **flags})
    assert trainer.global_step == plain.trainer.global_step
    assert recorder.recorded == kinds
    # two steps of an epoch are not recorded with more kinds, and the first steps never
    assert recorder.replayed >= 16 - kinds * WARM_UP_STEPS
    expected = weights(plain)
    assert all(torch.equal(t, expected[name]) for name, t in weights(graphed).items())


@pytest.mark.parametrize("what", ["layer", "mode"])
def test_changed_model_is_recorded_again(train, tmp_path, resnet, recorder, what):
    flags = {"limit_train_batches": 2 * WARM_UP_STEPS + 5, "callbacks": [Freeze(what)]}
    _, plain = train(tmp_path, resnet, **flags)
    _, graphed = train(tmp_path, {**resnet, "cuda_graph": True}, **flags)
    assert recorder.recorded == 2
    expected = weights(plain)
    assert all(torch.equal(t, expected[name]) for name, t in weights(graphed).items())


def test_step_that_cannot_be_recorded_is_an_error_of_one_line(train, tmp_path, recorder):
    def record(function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    recorder.record = record
    with pytest.raises(UserError, match=r"^model.cuda_graph: .*not permitted.*false$"):
        train(tmp_path, {"cuda_graph": True}, limit_train_batches=5)


def test_loss_that_is_not_finite_is_found_in_a_recorded_step(train, tmp_path, recorder):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                with torch.no_grad():
                    next(pl_module.model.head.parameters()).fill_(torch.nan)

    with pytest.raises(Exception, match=r"step 5: loss is not finite.*head.weight contains NaN"):
        train(tmp_path, {"cuda_graph": True}, callbacks=[Spoil()], limit_train_batches=8)
    assert recorder.replayed


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device": "cpu"}, r"need an NVIDIA GPU, and this run uses cpu"),
        ({"strategy": "DDPStrategy"}, r"got DDPStrategy.*--trainer.devices 1"),
        ({"scaler": object()}, r"trainer.precision=16-mixed.*pass bf16-mixed or 32-true"),
        ({"compile_mode": "reduce-overhead"}, r"model.compile_mode=reduce-overhead.*pass default"),
    ],
)
def test_check_names_what_is_not_supported(how, message):
    strategy = type(how.get("strategy", "SingleDeviceStrategy"), (), {})()
    strategy.root_device = torch.device(how.get("device", "cuda"))
    trainer = SimpleNamespace(
        strategy=strategy,
        precision="16-mixed",
        precision_plugin=SimpleNamespace(scaler=how.get("scaler")),
    )
    hparams = SimpleNamespace(compile=True, compile_mode=how.get("compile_mode", "default"))
    with pytest.raises(UserError, match=message) as error:
        check_cuda_graph(trainer, hparams)
    assert str(error.value).startswith("model.cuda_graph: ") and "\n" not in str(error.value)
    assert not re.search(r"<|object at", str(error.value))


def test_fit_on_a_cpu_is_refused_and_other_stages_are_not(train, tmp_path):
    with pytest.raises(UserError, match=r"^model.cuda_graph: .* pass --model.cuda_graph false$"):
        train(tmp_path, {"cuda_graph": True})
    trainer, module = train(tmp_path)
    module.hparams.cuda_graph = True
    trainer.validate(module, trainer.datamodule, verbose=False)
