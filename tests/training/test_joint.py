"""The joint step: gradients of a plain loop over the summed losses, in the memory of one width."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tq_lightning import bit_width, prepare
from tq_lightning.errors import TrainingError
from tq_lightning.models import create_model
from tq_lightning.quant import bit_width as bit_width_file
from tq_lightning.quant import fused_weights as fused_weights_file
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import per_width_norms, train_float_norms
from tq_lightning.training.joint import joint_loss

WIDTHS = (8, 4, 2, 1)


def conv_net():
    return create_model("resnet8_cifar", num_classes=10)


def vit():
    return create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
    )


class Tied(nn.Module):
    """Two layers share one weight; `gain` and `shift` get the same gradient tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.head = (
            nn.Linear(12, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 10),
        )
        self.two.weight = self.one.weight
        self.gain, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.one(torch.relu(self.stem(x.flatten(1)[:, :12])))
        return self.head(
            torch.relu(
                self.two(torch.relu(x * (self.gain + self.shift) + (self.gain + self.shift)))
            )
        )


BUILDERS = {"conv and batch norm": conv_net, "vit": vit, "tied": Tied}


def prepare_model(build, **how):
    torch.manual_seed(0)
    model = build()
    prepare(model, **{"verbose": False, **how})
    return model.train()


def make_batch(size=4, edge=16):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, edge, edge, generator=draw), torch.randint(
        0, 10, (size,), generator=draw
    )


def recursive_loss(target):
    """Return the loss: labels for the widest, the next wider width as teacher of the rest."""

    def loss(bits, logits, wider):
        if not wider:
            return F.cross_entropy(logits, target)
        teacher = list(wider.values())[-1].softmax(1)
        return -(teacher * logits.log_softmax(1)).sum(1).mean()

    return loss


def plain_loop(model, images, widths, width_loss, weights=None):
    """Run a loop in plain PyTorch with one backward() per width, accumulating in .grad."""
    losses, logits = {}, {}
    for i, bits in enumerate(widths):
        with bit_width(model, bits):
            out = model(images)
        losses[bits] = width_loss(bits, out, logits)
        logits[bits] = out.detach()
        (losses[bits] * (1.0 if weights is None else weights[i])).backward()
    return losses


def assert_same_grads(one, two, rtol=1e-4):
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            scale = q.grad.abs().max().item()
            torch.testing.assert_close(
                p.grad,
                q.grad,
                rtol=rtol,
                atol=rtol * scale + 1e-9,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("quantizer", ["floor", "round"])
def test_gradients_equal_those_of_a_plain_loop(name, quantizer):
    ours = prepare_model(BUILDERS[name], quantizer=quantizer)
    theirs = copy.deepcopy(ours)
    images, target = make_batch()
    weights = [1.0, 0.5, 2.0, 1.5]
    expected = plain_loop(theirs, images, WIDTHS, recursive_loss(target), weights)
    loss, losses = joint_loss(ours, images, WIDTHS, recursive_loss(target), weights)
    assert all(p.grad is None for p in ours.parameters()), (
        "nothing reaches .grad before the one backward"
    )
    loss.backward()
    for bits in WIDTHS:
        assert losses[bits].item() == pytest.approx(expected[bits].item(), rel=1e-5)
        assert not losses[bits].requires_grad
    assert loss.item() == pytest.approx(
        sum(w * expected[b].item() for w, b in zip(weights, WIDTHS, strict=True)), rel=1e-5
    )
    assert_same_grads(ours, theirs)
    for name, ours_buffer in ours.named_buffers():
        assert torch.equal(ours_buffer, theirs.get_buffer(name)), name
    assert all(w.original.grad.abs().sum() > 0 for w in weight_quantizers(ours))


@pytest.mark.parametrize("normalizer", ["absmax", "tanh_channel", "absmax_channel"])
def test_gradients_equal_those_of_a_plain_loop_for_every_normalizer(normalizer):
    ours = prepare_model(conv_net, normalizer=normalizer)
    train_float_norms(ours)
    theirs = copy.deepcopy(ours)
    images, target = make_batch()
    plain_loop(theirs, images, (None, *WIDTHS), recursive_loss(target))
    joint_loss(ours, images, (None, *WIDTHS), recursive_loss(target))[0].backward()
    assert_same_grads(ours, theirs)


def test_parameters_never_share_a_gradient_tensor():
    model = prepare_model(Tied)
    images, target = make_batch()
    joint_loss(model, images, WIDTHS, recursive_loss(target))[0].backward()
    pointers = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    assert len(set(pointers)) == len(pointers)
    torch.testing.assert_close(model.gain.grad, model.shift.grad)


def test_summed_gradient_differs_from_that_of_one_width():
    """Counter-example: the sum over widths is neither the gradient of one width nor the mean."""
    ours, theirs = prepare_model(conv_net), prepare_model(conv_net)
    images, target = make_batch()
    joint_loss(ours, images, WIDTHS, recursive_loss(target))[0].backward()
    joint_loss(theirs, images, (8,), recursive_loss(target))[0].backward()
    with pytest.raises(AssertionError):
        assert_same_grads(ours, theirs)


def test_memory_does_not_grow_with_the_number_of_widths():
    """Measure the peak bytes that autograd saves for backward, of one width at a time."""

    def peak(widths, step):
        held = {"now": 0, "peak": 0}

        class SavedTensor:
            def __init__(self, t):
                self.t, self.bytes = t, t.numel() * t.element_size()
                held["now"] += self.bytes
                held["peak"] = max(held["peak"], held["now"])

            def __del__(self):
                held["now"] -= self.bytes

        model = prepare_model(conv_net)
        images, target = make_batch()
        with torch.autograd.graph.saved_tensors_hooks(SavedTensor, lambda h: h.t):
            step(model, images, widths, recursive_loss(target))
        return held["peak"]

    def joint(model, images, widths, width_loss):
        joint_loss(model, images, widths, width_loss)[0].backward()

    def summed(model, images, widths, width_loss):
        total, logits = 0, {}
        for bits in widths:
            with bit_width(model, bits):
                out = model(images)
            total = total + width_loss(bits, out, logits)
            logits[bits] = out.detach()
        total.backward()

    one = peak((8,), joint)
    assert peak(WIDTHS, joint) <= 1.02 * one
    assert peak(WIDTHS, summed) > 3 * one  # the counter-example: one backward at the end


def test_incoming_gradient_is_scaled_and_accumulated():
    once, twice = prepare_model(vit), prepare_model(vit)
    images, target = make_batch()
    joint_loss(once, images, WIDTHS, recursive_loss(target))[0].backward()
    for _ in range(2):  # as Lightning does with accumulate_grad_batches=2
        (joint_loss(twice, images, WIDTHS, recursive_loss(target))[0] / 2).backward()
    assert_same_grads(once, twice)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradients_are_the_same_if_autograd_assigns_them(hook):
    """A hook of a parameter is called by the backward pass of the joint loss."""
    direct = prepare_model(conv_net).to(memory_format=torch.channels_last)
    observed, called = copy.deepcopy(direct), []
    images, target = make_batch()
    getattr(per_width_norms(observed)[0].sets["8"].weight, hook)(lambda _: called.append(1))
    trained = sum(p.requires_grad for p in direct.parameters())
    for model, nodes in ((direct, 1), (observed, trained)):
        for _ in range(2):  # the second one adds to the gradients of the first
            loss, _ = joint_loss(model, images, WIDTHS, recursive_loss(target))
            called.clear()  # a hook of the tensor also sees its gradient of a width
            (loss * 0.5).backward()
            assert sum(node is not None for node, _ in loss.grad_fn.next_functions) == nodes
        assert len(called) == (model is observed)
    for (name, p), q in zip(direct.named_parameters(), observed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad) and p.grad.stride() == q.grad.stride(), name
            assert p.grad.stride() == p.stride()


def test_gradient_scaler_is_applied_inside_and_removed():
    """The scale factor is applied inside, where float16 gradients would underflow."""
    plain, scaled = prepare_model(vit), prepare_model(vit)
    images, target = make_batch()
    joint_loss(plain, images, WIDTHS, recursive_loss(target))[0].backward()
    seen = []
    next(scaled.parameters()).register_hook(lambda g: seen.append(g.abs().max().item()))
    loss, _ = joint_loss(scaled, images, WIDTHS, recursive_loss(target), loss_scale=1024.0)
    inner = max(seen)
    (loss * 1024.0).backward()  # scaler.scale(loss).backward()
    for p in scaled.parameters():
        if p.grad is not None:
            p.grad /= 1024.0  # scaler.unscale_(optimizer)
    assert inner > 100 * next(plain.parameters()).grad.abs().max().item()
    assert_same_grads(plain, scaled)


def test_overflow_of_scaled_gradients_is_handled_by_the_scaler():
    model = prepare_model(vit)
    images, target = make_batch()
    loss, _ = joint_loss(model, images, (8,), recursive_loss(target), loss_scale=float(2**127))
    loss.backward()
    assert any(not torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_norms_of_widths_outside_the_sandwich_get_no_gradient():
    model = prepare_model(conv_net)
    images, target = make_batch()
    joint_loss(model, images, (8, 1), recursive_loss(target))[0].backward()
    for name, p in model.named_parameters():
        if ".sets." in name:
            took_part = ".sets.8." in name or ".sets.1." in name
            assert (p.grad is not None) == took_part, name
        else:
            assert p.grad is not None, name


def test_frozen_parameters_get_no_gradient():
    model = prepare_model(conv_net)
    frozen = [w.original.requires_grad_(False) for w in weight_quantizers(model)[:2]]
    images, target = make_batch()
    joint_loss(model, images, WIDTHS, recursive_loss(target))[0].backward()
    assert all(p.grad is None for p in frozen)
    assert weight_quantizers(model)[2].original.grad is not None


def test_non_finite_loss_error_names_the_width():
    model = prepare_model(conv_net)
    images, target = make_batch()
    before = [p.detach().clone() for p in model.parameters()]

    def bad(bits, logits, wider):
        return F.cross_entropy(logits, target) * (float("nan") if bits == 2 else 1.0)

    with pytest.raises(TrainingError, match="not finite at width 2"):
        joint_loss(model, images, WIDTHS, bad)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert width_of(model).fused is None
    assert all(w.quantizer.fused_weight is None for w in weight_quantizers(model))
    joint_loss(model, images, WIDTHS, recursive_loss(target))[0].backward()


@pytest.mark.parametrize("activations", ["clamp_round", "clamp_floor_truncate", "pact_floor"])
@pytest.mark.parametrize("place", ["conv1.weight", "layer1.0.bn1.sets.8.bias"])
def test_nan_hidden_by_integer_codes_is_detected(activations, place):
    """Codes of a quantized activation hide a NaN, so the loss stays finite."""
    model = prepare_model(conv_net, activations=activations)
    images, target = make_batch()
    with torch.no_grad():
        model.get_parameter(place).view(-1)[0] = float("nan")
    with pytest.raises(
        TrainingError, match=rf"not finite at width 8; {re.escape(place)} contains NaN"
    ):
        joint_loss(model, images, WIDTHS, recursive_loss(target))


def test_non_finite_loss_with_finite_weights_names_no_weight():
    model = prepare_model(conv_net)
    images, _ = make_batch()
    with pytest.raises(TrainingError, match=r"not finite at width 4$"):
        joint_loss(
            model,
            images,
            WIDTHS,
            lambda bits, out, wider: out.sum() * (float("inf") if bits == 4 else 1.0),
        )


def test_two_steps_in_one_block_do_not_share_memory():
    """A caller may hold `fused_weights` open; gradients take memory that the next step must not."""
    ours, theirs = prepare_model(conv_net), prepare_model(conv_net)
    images, target = make_batch()
    with fused_weights(ours):
        both = [joint_loss(ours, images, WIDTHS, recursive_loss(target))[0] for _ in range(2)]
    sum(both).backward()
    for _ in range(2):
        joint_loss(theirs, images, WIDTHS, recursive_loss(target))[0].backward()
    assert_same_grads(ours, theirs)


@pytest.mark.parametrize(
    ("how", "most"), [({}, 2.25), ({"ste": "dsq"}, 3.5), ({"quantizer": "round"}, 3)]
)
def test_few_buffers_are_kept_between_widths(how, most):
    """The weights of a width, the sums of gradients, and codes that nest, or else u.

    Rules per element need u and codes.
    """
    model = prepare_model(conv_net, **how)
    images, target = make_batch()
    fused, held = width_of(model), []

    def measure(*_):
        (group,) = fused.fused.groups
        kept = [v for v in vars(group).values() if isinstance(v, torch.Tensor)]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        held.append(sum(storages.values()))

    model.register_forward_hook(measure)
    joint_loss(model, images, WIDTHS, recursive_loss(target))
    (weights,) = {sum(4 * w.original.numel() for w in weight_quantizers(model))}
    assert len(held) == len(WIDTHS) and weights <= held[0] < held[-1]
    assert held[-1] <= most * weights + 2**16  # and a column per weight, and rows that are not full


def test_joint_step_lists_the_modules_once(monkeypatch):
    """A step of a small network on a GPU takes as long as the Python code around its operations."""
    model = prepare_model(conv_net)
    images, target = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    walks = []

    def count(where, name):
        original = getattr(where, name)

        def counted(*args, **kwargs):
            walks.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, counted)

    for module in (bit_width_file, fused_weights_file):
        count(module, "walk_modules")
    count(nn.Module, "named_modules")  # `modules` and `parameters` use it, too

    def step():
        loss, _ = joint_loss(model, images, WIDTHS, lambda b, out, w: F.cross_entropy(out, target))
        loss.backward()

    step()
    assert walks == ["walk_modules"]
    with bit_width(model, 4):  # a switch by itself lists them again
        model(images)
    assert walks == ["walk_modules"] * 2
    model.fused_model = None  # the model keeps its fused weights from now on
    for _ in range(3):
        step()
    assert walks == ["walk_modules"] * 3


def test_joint_step_switches_the_layers_once(monkeypatch):
    model = conv_net()
    prepare(model, verbose=False)
    images, loss = torch.randn(2, 3, 32, 32), lambda bits, out, wider: out.square().mean()
    restored = []
    restore = fused_weights_file.UnparametrizedLayers.restore

    def count(self):
        restored.append(self)
        restore(self)

    monkeypatch.setattr(fused_weights_file.UnparametrizedLayers, "restore", count)
    joint_loss(model, images, WIDTHS, loss)
    assert len(restored) == 2  # by the joint step, and by its block of fused weights
    with fused_weights(model) as fused:  # the counter-example: widths on their own
        for bits in WIDTHS:
            with fused.at(bits):
                model(images)
    assert len(restored) == 2 + len(WIDTHS) + 1


def test_loss_may_run_the_model_at_another_width():
    model = conv_net()
    prepare(model, verbose=False)
    images, seen = torch.randn(2, 3, 32, 32), {}

    def loss(bits, out, wider):
        with torch.no_grad(), bit_width(model, 1):
            narrow = model(images)
        with torch.no_grad():
            seen[bits] = model(images), narrow
        return out.square().mean()

    joint_loss(model, images, (8, 2), loss)
    for bits, (again, narrow) in seen.items():
        with torch.no_grad(), bit_width(model, bits):
            assert torch.equal(again, model(images))
        assert not torch.equal(again, narrow)
    assert not any(w.quantizer.fused_weight is not None for w in weight_quantizers(model))


def test_kept_weights_have_the_same_addresses_in_every_step():
    """CUDA graphs read them there; a model that does not keep them has new ones."""
    kept, plain = prepare_model(conv_net), prepare_model(conv_net)
    kept.fused_model = None
    images, target = make_batch()
    addresses, losses = [], {kept: [], plain: []}
    for step in range(4):
        if step == 2:  # an evaluation in between uses the same memory
            with torch.inference_mode(), fused_weights(kept), bit_width(kept, 4):
                kept(images)
        for model in (kept, plain):
            loss, _ = joint_loss(model, images, WIDTHS, recursive_loss(target))
            loss.backward()
            with torch.no_grad():  # the weights change between the steps, and gradients are summed
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad
            losses[model].append(loss.item())
        (group,) = kept.fused_model.groups
        addresses.append([t.data_ptr() for t in group.tensors])
    assert all(a == addresses[0] for a in addresses)
    assert losses[kept] == losses[plain] and len(set(losses[kept])) == 4
    assert_same_grads(kept, plain)


def test_kept_weights_follow_a_changed_model():
    model = prepare_model(conv_net)
    model.fused_model = None
    images, target = make_batch()

    def grads():
        for p in model.parameters():
            p.grad = None
        joint_loss(model, images, WIDTHS, recursive_loss(target))[0].backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    first, before = grads(), model.fused_model
    assert grads() == first and model.fused_model is before
    w = weight_quantizers(model)[0]
    w.original.requires_grad_(False)
    frozen = grads()
    assert first - frozen == {w.name.replace("weight", "parametrizations.weight.original")}
    assert model.fused_model is not before
    w.original.requires_grad_(True)
    assert grads() == first and model.fused_model.describes(model)
    model.extra = nn.Identity()
    assert not model.fused_model.describes(model) and model.fused_model.is_current()


@pytest.mark.parametrize("how", [{}, {"activations": "pact_floor"}])
def test_kept_weights_train_after_an_evaluation_in_inference_mode(how):
    model, plain = prepare_model(conv_net, **how), prepare_model(conv_net, **how)
    model.fused_model = None
    images, target = make_batch()
    with torch.inference_mode(), fused_weights(model, keep=True), bit_width(model, 4):
        model(images)
    for each in (model, plain):
        joint_loss(each, images, WIDTHS, recursive_loss(target))[0].backward()
    assert_same_grads(model, plain)


def test_kept_weights_follow_replaced_parameters():
    model = prepare_model(conv_net)
    model.fused_model = None
    images, target = make_batch()

    def step():
        joint_loss(model, images, WIDTHS, recursive_loss(target))[0].backward()
        return model.fused_model

    first = step()
    norm = per_width_norms(model)[0].sets["8"]
    norm.bias = nn.Parameter(norm.bias.detach().clone())
    assert step() is not first and norm.bias.grad is not None


def test_blocks_that_do_not_keep_their_weights_do_not_use_kept_ones():
    """A switch of modules between two calls is seen, as in a model that keeps nothing."""
    model = prepare_model(conv_net)
    model.fused_model = None
    images, target = make_batch()
    joint_loss(model, images, WIDTHS, recursive_loss(target))
    with fused_weights(model) as fused:
        assert fused is not model.fused_model
        with fused_weights(model, keep=True) as inner:  # shares the open block
            assert inner is fused


def test_failed_step_leaves_no_gradient_on_kept_weights():
    model = prepare_model(conv_net)
    model.fused_model = None
    images, target = make_batch()

    def fail(bits, out, wider):
        if bits == 4:
            raise RuntimeError("failed")
        return F.cross_entropy(out, target)

    with pytest.raises(RuntimeError, match="failed"):
        joint_loss(model, images, WIDTHS, fail)
    (group,) = model.fused_model.groups
    assert group.tensors and not any(t.requires_grad for t in group.tensors)


def test_only_the_weights_of_one_width_are_kept_between_steps():
    model = prepare_model(conv_net, normalizer="tanh_channel")
    model.fused_model = None
    images, target = make_batch()
    joint_loss(model, images, WIDTHS, recursive_loss(target))
    (group,) = model.fused_model.groups
    kept = {id(v): v.nbytes for v in vars(group).values() if isinstance(v, torch.Tensor)}
    assert sum(kept.values()) == group._buffer.nbytes


def test_block_of_a_part_does_not_hide_parameters_of_the_whole_model():
    model, plain = prepare_model(conv_net), prepare_model(conv_net)
    images, target = make_batch()
    part = next(m for m in model.children() if any(True for _ in weight_quantizers(m)))
    with fused_weights(part):
        joint_loss(model, images, WIDTHS, recursive_loss(target))[0].backward()
    joint_loss(plain, images, WIDTHS, recursive_loss(target))[0].backward()
    named = zip(model.named_parameters(), plain.parameters(), strict=True)
    assert all((p.grad is None) == (q.grad is None) for (_, p), q in named)


def test_norm_parameter_tied_over_widths_has_the_gradient_of_both():
    def gradients(tied):
        model = prepare_model(conv_net)
        sets = per_width_norms(model)[0].sets
        if tied:
            sets["2"].weight = sets["8"].weight
        images, target = make_batch(2, 8)
        loss, _ = joint_loss(model, images, WIDTHS, lambda b, out, w: F.cross_entropy(out, target))
        loss.backward()
        return [sets[key].weight.grad for key in ("8", "2")]

    wide, narrow = gradients(False)
    tied, same = gradients(True)
    assert tied is same and torch.allclose(tied, wide + narrow, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_recomputes_at_the_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.saves = conv_net(), False

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False) if self.saves else self.net(x)

    def gradients(saves):
        model = prepare_model(Net)
        model.saves = saves
        images, target = make_batch(2, 8)
        loss, _ = joint_loss(model, images, WIDTHS, lambda b, out, w: F.cross_entropy(out, target))
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(plain[n], recomputed[n], rtol=1e-5, atol=1e-7) for n in plain)
