"""Losses on logits small enough to work out by hand."""

import math

import pytest
import torch

from tq_lightning.training.losses import (
    LOSSES,
    TEACHERS,
    bce,
    cross_entropy,
    distillation,
)

LN3 = math.log(3.0)  # softmax([ln 3, 0]) = [3/4, 1/4]


def test_cross_entropy_of_known_logits():
    logits = torch.tensor([[LN3, 0.0], [0.0, 0.0]])
    assert cross_entropy(logits, torch.tensor([0, 1])).item() == pytest.approx(
        (math.log(4 / 3) + math.log(2)) / 2
    )
    soft = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    expected = (0.5 * math.log(4 / 3) + 0.5 * math.log(4) + math.log(2)) / 2
    assert cross_entropy(logits, soft).item() == pytest.approx(expected)


def test_bce_of_known_logits():
    """Sigmoid(ln 3) = 3/4; summed over classes, mean over the batch."""
    logits = torch.tensor([[LN3, 0.0]])
    expected = math.log(4 / 3) + math.log(2)
    assert bce(logits, torch.tensor([0])).item() == pytest.approx(expected)
    assert bce(
        logits.expand(3, 2), torch.tensor([[1.0, 0.0]]).expand(3, 2)
    ).item() == pytest.approx(expected)
    assert bce(logits, torch.tensor([1])).item() != pytest.approx(expected)


def test_distillation_loss_of_known_logits():
    teacher = torch.tensor([[LN3, 0.0]])
    flat = torch.zeros(1, 2)
    assert distillation(teacher, teacher).item() == pytest.approx(0.0, abs=1e-7)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation(flat, teacher).item() == pytest.approx(kl)
    assert distillation(teacher, flat).item() == pytest.approx(
        0.5 * math.log(4 / 3)
    )  # KL is not symmetric
    assert distillation(flat.expand(5, 2), teacher.expand(5, 2)).item() == pytest.approx(
        kl
    )  # a mean over the batch


def test_temperature_softens_the_targets_and_keeps_the_gradient_scale():
    """At T = 2 the teacher's odds 9:1 become 3:1, and T^2 = 4 keeps the size of the gradient."""
    teacher = torch.tensor([[math.log(9.0), 0.0]])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation(torch.zeros(1, 2), teacher, temperature=2.0).item() == pytest.approx(4 * kl)


def test_teacher_gets_no_gradient():
    student, teacher = (
        torch.zeros(1, 2, requires_grad=True),
        torch.tensor([[LN3, 0.0]], requires_grad=True),
    )
    distillation(student, teacher).backward()
    assert teacher.grad is None
    assert torch.allclose(
        student.grad, torch.tensor([[-0.25, 0.25]])
    )  # softmax(student) - softmax(teacher)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(name, dtype):
    logits = torch.tensor([[20.0, -20.0, 0.5]], dtype=dtype)
    value = LOSSES[name](logits, torch.tensor([2]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        LOSSES[name](logits.float(), torch.tensor([2])).item(), rel=1e-6
    )
    assert distillation(logits, logits.roll(1, 1)).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_labels_and_one_hot_soft_labels_give_equal_losses(name):
    logits, target = (
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 3, 0, 1]),
    )
    hot = torch.nn.functional.one_hot(target, 4).float()
    assert LOSSES[name](logits, target).item() == pytest.approx(
        LOSSES[name](logits, hot).item(), rel=1e-6
    )
    assert LOSSES[name](logits, target.roll(1)).item() != pytest.approx(
        LOSSES[name](logits, hot).item(), rel=1e-3
    )


def test_teachers_match_the_documentation():
    assert TEACHERS == ("none", "widest", "recursive", "external")
