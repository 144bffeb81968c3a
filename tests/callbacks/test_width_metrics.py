"""The passes of an evaluation, their logits and metrics."""

import pytest
import torch

from tq_lightning import bit_width, prepare
from tq_lightning.callbacks.width_metrics import (
    evaluate_batch,
    evaluation_passes,
    sources_agree,
    width_metrics,
)
from tq_lightning.models import create_model
from tq_lightning.quant import fake_quantize, fused_weights
from tq_lightning.quant.norm_calibration import calibrate_norms


def network(**how):
    torch.manual_seed(0)
    model = create_model("resnet8_cifar", num_classes=10)
    prepare(model, **{"verbose": False, **how})
    calibrate_norms(model, [torch.randn(8, 3, 8, 8)])
    return model.eval()


def test_passes_that_agree_by_construction_run_once():
    floor, rounded = network(), network(quantizer="round")
    assert evaluation_passes(floor) == [
        *((b, "truncate") for b in range(8, 0, -1)),
        (None, "quantize"),
    ]
    passes = evaluation_passes(rounded)
    assert passes[0] == (8, "truncate") and (8, "quantize") not in passes
    assert [(b, s) for b, s in passes if s == "quantize"] == [
        (b, "quantize") for b in (7, 6, 5, 4, 3, 2, 1, None)
    ]
    assert all(sources_agree(floor, b) for b in range(1, 9)) and not sources_agree(rounded, 2)
    mixed = network(
        activations="clamp_round_truncate"
    )  # floor weights, but activations whose shift shows
    assert not sources_agree(mixed, 2) and sources_agree(mixed, 8)
    assert sources_agree(
        network(activations="clamp_round"), 2
    )  # activations are rounded at n bits in both


@pytest.mark.parametrize(
    "how", [{}, {"quantizer": "round"}, {"activations": "clamp_floor_truncate"}]
)
def test_logits_equal_those_of_separate_passes(how):
    model, images = network(**how), torch.randn(4, 3, 8, 8)
    passes = evaluation_passes(model)
    together = evaluate_batch(model, images, passes)
    assert list(together) == passes
    with torch.no_grad():
        for bits, source in [*passes, *((b, "quantize") for b in range(1, 9))]:
            with bit_width(model, bits, source):
                alone = model(images)
            if (bits, source) in together:
                assert torch.equal(alone, together[bits, source]), (bits, source)
            else:  # copied results agree bit for bit
                assert torch.equal(alone, together[bits, "truncate"]), (bits, source)


def test_round_truncated_logits_differ_from_quantized_ones():
    model, images = network(quantizer="round"), torch.randn(4, 3, 8, 8)
    logits = evaluate_batch(model, images, evaluation_passes(model))
    assert not torch.equal(logits[2, "truncate"], logits[2, "quantize"])
    assert not torch.equal(logits[8, "truncate"], logits[None, "quantize"])


def test_truncated_passes_shift_uint8_codes(monkeypatch):
    model, images, seen = network(), torch.randn(2, 3, 8, 8), []
    plain = fake_quantize.truncate_codes

    def spy(codes, from_bits, to_bits):
        out = plain(codes, from_bits, to_bits)
        assert codes.dtype == out.dtype == torch.uint8
        assert torch.equal(out, codes >> (from_bits - to_bits))
        seen.append((from_bits, to_bits))
        return out

    monkeypatch.setattr(fake_quantize, "truncate_codes", spy)
    monkeypatch.setattr(fused_weights, "truncate_codes", spy)
    evaluate_batch(model, images, [(2, "truncate")])
    assert seen == [(8, 2)]  # all weights in one call
    seen.clear()
    evaluate_batch(model, images, [(None, "quantize")])
    evaluate_batch(network(quantizer="round"), images, [(2, "quantize")])
    assert seen == []


def test_metrics_have_the_documented_keys_and_values():
    accuracy = {(b, "truncate"): 10.0 * b for b in range(1, 9)} | {
        (2, "quantize"): 55.0,
        (None, "quantize"): 90.0,
    }
    got = width_metrics("test", accuracy, 8, (8, 4, 1))
    widths = {
        f"test/{key}_w{b}"
        for b in range(1, 9)
        for key in ("acc1_quantize", "acc1_truncate", "qt_gap")
    }
    assert set(got) == widths | {"test/acc1_truncate_mean", "test/acc1_float"}
    assert got["test/acc1_truncate_mean"] == pytest.approx((80 + 40 + 10) / 3)
    assert (got["test/acc1_quantize_w2"], got["test/acc1_truncate_w2"], got["test/qt_gap_w2"]) == (
        55.0,
        20.0,
        35.0,
    )
    assert (got["test/acc1_quantize_w5"], got["test/qt_gap_w5"]) == (50.0, 0.0)  # copied
