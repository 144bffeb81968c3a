"""Devices, with the meta device for a GPU: nothing of a step may lie on the CPU.

An operation that mixes the meta device and the CPU is an error, as it is on a GPU, and values of
the meta device can't be read. What is computed there needs a GPU (`test_gpu.py`).
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fixtures.dispatch import HOST_READ, Operations
from torch.utils._pytree import tree_leaves

from tq_lightning import bit_width, calibrate_norms, load_packed, prepare, save_packed
from tq_lightning.callbacks.scores import SCORES
from tq_lightning.callbacks.width_metrics import evaluate_batch, evaluation_passes
from tq_lightning.models import create_model
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.training.joint import joint_loss

WIDTHS = (8, 4, 2, 1)


class Fake(Operations):
    """Counts operations; a value read from the device is True, and CPU tensors are recorded."""

    def __init__(self):
        super().__init__()
        self.on_cpu = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) == HOST_READ:
            self.counts[HOST_READ] += 1
            return True
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.on_cpu += [str(func) for t in made if t.device.type == "cpu"]
        return out


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Autocast refuses the meta device by name."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())


def build(**how):
    torch.manual_seed(0)
    model = create_model("resnet8_cifar", num_classes=10)
    prepare(model, verbose=False, **how)
    return model.to("meta").train()


def batch():
    return torch.empty(4, 3, 16, 16, device="meta"), torch.zeros(
        4, dtype=torch.int64, device="meta"
    )


HOW = [
    {},
    {"quantizer": "round", "ste": "dsq", "activations": "pact_round"},
    {"normalizer": "tanh_channel", "activations": "clamp_floor_truncate"},
    {"normalizer": "learned_channel", "level": "centre", "scale": "span"},
    {"normalizer": "float_e2", "level": "centroid", "scale": "span"},
]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(how.values()) or "default")
def test_a_joint_step_stays_on_the_device_and_reads_one_value(how):
    model, (images, target) = build(**how), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):  # the first one copies constants to the device
        fake = Fake()
        with fake:
            loss, losses = joint_loss(
                model, images, WIDTHS, lambda bits, out, wider: F.cross_entropy(out, target)
            )
            loss.backward()
            optimizer.step()
    assert fake.counts[HOST_READ] == 1
    assert not fake.on_cpu and fake.counts["aten.lift_fresh.default"] == 0
    assert {t.device.type for t in [loss, *losses.values()]} == {"meta"}
    trained = [p for p in model.parameters() if p.grad is not None]
    state = [v for p in trained for v in optimizer.state[p].values()]
    assert trained and all(t.is_meta for t in [*state, *(p.grad for p in trained)])


@pytest.mark.parametrize("how", HOW[:3], ids=lambda how: "-".join(how.values()) or "default")
def test_an_evaluation_stays_on_the_device(how):
    model, (images, target) = build(**how).eval(), batch()
    with Fake():
        calibrate_norms(model, [images])
    for norm in per_width_norms(model):
        assert norm.calibrated.is_meta
        norm._calibrated_widths = lambda: [True] * 9  # the flags can't be read
    passes = evaluation_passes(model)
    h = type("H", (), {"max_bits": 8, "num_classes": 10})()
    scores = SCORES["classification"](passes, h, WIDTHS, torch.device("meta"))
    fake = Fake()
    with fake:
        logits = evaluate_batch(model, images, passes)
        scores.add(logits, target)
    assert len(logits) == len(passes) and all(out.is_meta for out in logits.values())
    assert fake.counts[HOST_READ] == 1 and not fake.on_cpu


def test_what_lies_on_the_cpu_is_seen():
    """The counter-example: an operation that forgets the device."""
    fake = Fake()
    with fake:
        torch.ones(2)
    assert fake.on_cpu
    with pytest.raises(RuntimeError), fake:
        torch.ones(2) + torch.ones(2, device="meta")


@pytest.mark.parametrize("mode", ["resident", "lean"])
def test_planes_and_norms_of_a_packed_model_move(mode, tmp_path):
    torch.manual_seed(0)
    model = create_model("resnet8_cifar", num_classes=10)
    prepare(model, verbose=False, normalizer="float_e2", level="centroid", scale="span")
    images = torch.randn(2, 3, 16, 16)
    calibrate_norms(model, [images])
    save_packed(model.eval(), tmp_path / "net.safetensors")
    packed = load_packed(tmp_path / "net.safetensors", mode=mode)
    with torch.no_grad(), bit_width(packed, 4):
        packed(images)  # keeps the weights of this width
        packed.to("meta")
        assert all(t.is_meta for t in [*packed.parameters(), *packed.buffers()])
        for bits in (8, 4, 1):
            with bit_width(packed, bits):
                assert packed(images.to("meta")).is_meta
