"""Operations dispatched by a joint step and an evaluation, and values read from the device.

Counts are exact and the same on every machine. On a GPU small networks are bound by them.
"""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fixtures.dispatch import HOST_READ, Operations

from tq_lightning import prepare
from tq_lightning.callbacks.width_metrics import evaluate_batch
from tq_lightning.models import create_model
from tq_lightning.quant.activation import ACTIVATIONS
from tq_lightning.quant.codes import LEVELS, QUANTIZERS
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.ste import STES
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.training.joint import joint_loss

WIDTHS = (8, 4, 2, 1)


def build(name, prepared, **how):
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    if prepared:
        prepare(model, widths=WIDTHS, verbose=False, **how)
    return model


def count(call):
    call()
    operations = Operations()
    with operations:
        call()
    return operations.counts


def joint_step(model, images, target):
    loss, _ = joint_loss(
        model, images, WIDTHS, lambda bits, out, wider: F.cross_entropy(out, target)
    )
    loss.backward()


@pytest.mark.parametrize(
    ("name", "size", "limit"),
    [("resnet20_cifar", 16, 1.25), pytest.param("resnet50", 32, 1.15, marks=pytest.mark.slow)],
)
def test_joint_step_dispatches_few_operations(name, size, limit):
    images, target = torch.randn(2, 3, size, size), torch.randint(0, 10, (2,))
    plain, model = build(name, False).train(), build(name, True).train()
    one = count(lambda: F.cross_entropy(plain(images), target).backward())
    joint = count(lambda: joint_step(model, images, target))
    assert one.total() > 0 and joint.total() <= limit * len(WIDTHS) * one.total()
    assert joint[HOST_READ] == 1 and one[HOST_READ] == 0


CHOICES = [
    *({"activations": kind} for kind in ACTIVATIONS),
    *({"ste": name} for name in STES if name != "value"),
    *({"quantizer": name} for name in QUANTIZERS),
    *(
        {"normalizer": name, "ste": "auto", "scale": row.scales[-1], "level": level}
        for name, row in NORMALIZERS.items()
        for level in row.levels or LEVELS
    ),
]


@pytest.mark.parametrize("how", CHOICES, ids=lambda how: "-".join(how.values()))
def test_every_choice_reads_one_value_from_the_device(how):
    images, target = torch.randn(2, 3, 8, 8), torch.randint(0, 10, (2,))
    model = build("resnet8_cifar", True, **how).train()
    assert count(lambda: joint_step(model, images, target))[HOST_READ] == 1


def test_operations_that_wait_for_a_gpu_only_are_counted():
    mask, value = torch.tensor([True, False]), torch.tensor(1.0)
    reads = count(lambda: torch.zeros(2).masked_fill(mask, value))[HOST_READ]
    assert reads == 1 and count(lambda: torch.zeros(2).masked_fill(mask, 1.0))[HOST_READ] == 0


class CountOperations(L.Callback):
    """Counts the operations from the start to the end of each training batch."""

    def __init__(self):
        self.counts = []

    def on_train_batch_start(self, *_):
        self.operations = Operations()
        self.operations.__enter__()

    def on_train_batch_end(self, *_):
        self.operations.__exit__(None, None, None)
        self.counts.append(self.operations.counts[HOST_READ])


def test_fit_reads_one_value_per_step(train, resnet, tmp_path):
    """With clipping, an accumulation, a sandwich and a float pass.

    A moving average reads a counter that is always on the CPU (`callbacks.ema`).
    """
    steps = CountOperations()
    model = {**resnet, "float_pass": True, "width_schedule": "sandwich"}
    flags = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "limit_train_batches": 4}
    train(tmp_path, {**model, "momentum": 0.9}, callbacks=[steps], limit_val_batches=0, **flags)
    assert steps.counts == [1] * 4


@pytest.mark.parametrize(
    ("name", "batches"),
    [("resnet20_cifar", 8), pytest.param("resnet50", 3, marks=pytest.mark.slow)],
)
def test_evaluation_dispatches_few_operations(name, batches):
    """Compare batches at 8 widths with as many passes of the float network.

    The weights are normalized once per evaluation; a real one has dozens of batches.
    """
    images = torch.randn(1, 3, 32, 32)
    plain, model = build(name, False).eval(), build(name, True).eval()
    for norm in per_width_norms(model):
        norm.calibrated.fill_(True)
    passes = [(bits, "truncate") for bits in range(8, 0, -1)]

    def floats():
        with torch.no_grad():
            for _ in range(batches * len(passes)):
                plain(images)

    def widths():
        with fused_weights(model):
            for _ in range(batches):
                evaluate_batch(model, images, passes)

    one, fused = count(floats), count(widths)
    assert fused.total() <= 1.1 * one.total()
    assert fused[HOST_READ] == 1
