"""Packed weights at run time: always those of the current width, model and state."""

import copy

import pytest
import torch

from tq_lightning import bit_width, load_packed, save_packed
from tq_lightning.export.packed.weight import packed_weights


def logits(model, images, bits, source=None):
    with torch.no_grad(), bit_width(model, bits, source):
        return model(images)


def test_resident_refills_one_buffer_and_lean_keeps_nothing(packed, net):
    resident, lean = load_packed(packed), load_packed(packed, mode="lean")
    logits(resident, net[1], 8)
    first = packed_weights(resident)[0]
    module, tensor, weight = first.module, first.tensor, first.packed
    place = weight._weight.data_ptr()
    codes = module.parametrizations[tensor].original.clone()
    logits(resident, net[1], 2)
    assert weight._weight.data_ptr() == place
    assert torch.equal(module.parametrizations[tensor].original, codes)
    logits(lean, net[1], 8)
    assert all(w.packed._weight is None for w in packed_weights(lean))


def test_resident_weights_are_reused_only_for_the_same_width_model_and_state(
    make, packed, net, monkeypatch
):
    model, images, other = load_packed(packed), net[1], make(quantizer="round")[0]
    first = packed_weights(model)[0]
    name, module, tensor, weight = first.name, first.module, first.tensor, first.packed
    expected = {bits: logits(net[0], images, bits, "truncate") for bits in (8, 2)}
    assert torch.equal(logits(model, images, 8), expected[8])
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, images, 2), expected[2])
    assert torch.equal(logits(model, images, 8), expected[8])

    made = []
    real = type(weight).forward
    monkeypatch.setattr(
        type(weight), "forward", lambda self, codes: made.append(self.name) or real(self, codes)
    )
    assert getattr(module, tensor) is weight._weight and not made
    assert getattr(copied.get_submodule(name.rpartition(".")[0]), tensor) is not weight._weight
    for again in (lambda: model.to("cpu"), lambda: model.load_state_dict(copied.state_dict())):
        again()
        made.clear()
        assert torch.equal(logits(model, images, 8), expected[8]) and name in made
    save_packed(other, packed.with_name("other.safetensors"))
    model.load_state_dict(load_packed(packed.with_name("other.safetensors")).state_dict())
    assert torch.equal(logits(model, images, 8), logits(other, images, 8, "truncate"))
    assert not torch.equal(logits(model, images, 8), expected[8])


def test_half_precision_models_are_saved_and_loaded(make, tmp_path):
    model, _ = make()
    model.half()
    save_packed(model, tmp_path / "m.safetensors")
    served = load_packed(tmp_path / "m.safetensors")
    assert served.fc.weight.dtype == torch.float16
    assert torch.equal(served.layer1[0].conv1.weight, with_width(model, 8))


def with_width(model, bits):
    with bit_width(model, bits, "truncate"):
        return model.layer1[0].conv1.weight.detach()


@pytest.mark.parametrize("mode", ["resident", "lean"])
def test_packed_model_can_be_converted_to_bfloat16(packed, net, mode):
    model, images = load_packed(packed, mode=mode), net[1]
    exact = {bits: logits(model, images, bits) for bits in (8, 2)}
    first = packed_weights(model)[0]

    def weight(bits):
        with bit_width(model, bits):
            return getattr(first.module, first.tensor).clone()

    floats = {bits: weight(bits) for bits in (8, 2)}
    model.to(torch.bfloat16)
    for bits, other in ((8, 2), (2, 8)):
        assert torch.equal(weight(bits), floats[bits].bfloat16())  # rounded once
        got = logits(model, images.bfloat16(), bits)
        assert got.dtype == torch.bfloat16
        error, far = ((got.float() - exact[n]).abs().max() for n in (bits, other))
        assert error < 0.03 * exact[bits].abs().max()
        assert far > 2 * error  # counter-example: another width differs more
    model.float()
    assert all(torch.equal(weight(bits), floats[bits]) for bits in (8, 2))
