"""Levels: exact values, in place or not, with the width as a number or a tensor."""

import pytest
import torch

from tq_lightning.quant.levels import LEVELS, codes_to_levels, dequantize

WIDTHS = range(1, 9)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("level", LEVELS)
def test_largest_code_may_be_a_tensor(level, bits):
    codes = torch.arange(2**bits).to(torch.uint8)
    levels = LEVELS[level](codes.float(), torch.tensor([2.0**bits - 1]))
    assert torch.equal(levels, codes_to_levels(codes, bits, level))


LEVEL_CASES = {  # name -> (level, bits, levels of all codes)
    "endpoint, 1 bit": ("endpoint", 1, [0.0, 1.0]),
    "endpoint, 2 bits": ("endpoint", 2, [0.0, 1 / 3, 2 / 3, 1.0]),
    "left, 1 bit": ("left", 1, [0.0, 0.5]),
    "left, 2 bits": ("left", 2, [0.0, 0.25, 0.5, 0.75]),
    "centre, 1 bit": ("centre", 1, [0.25, 0.75]),
    "centre, 2 bits": ("centre", 2, [0.125, 0.375, 0.625, 0.875]),
}


@pytest.mark.parametrize("case", LEVEL_CASES)
def test_levels_of_all_codes_are_exact(case):
    level, bits, expected = LEVEL_CASES[case]
    codes = torch.arange(2**bits).to(torch.uint8)
    assert torch.equal(codes_to_levels(codes, bits, level), torch.tensor(expected))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_map_returns_float32_levels_in_the_unit_interval(level, bits):
    codes = torch.arange(2**bits).to(torch.uint8)
    levels = codes_to_levels(codes, bits, level)
    assert levels.dtype == torch.float32 and levels.min() >= 0 and levels.max() <= 1
    assert torch.allclose(
        levels.diff(), torch.tensor(1 / (2**bits - 1) if level == "endpoint" else 2.0**-bits)
    )
    assert codes.tolist() == list(range(2**bits))  # the codes are unchanged
    scale = torch.tensor([[0.5], [3.0]])
    weights = dequantize(codes.expand(2, -1), bits, scale, level)
    assert torch.equal(weights, scale * (2 * levels - 1))
    held = torch.full_like(weights, torch.nan)
    assert dequantize(codes.expand(2, -1), bits, scale, level, out=held) is held
    assert torch.equal(held.view(torch.int32), weights.view(torch.int32))  # bit for bit


def test_out_of_another_dtype_or_shape_is_an_error():
    codes = torch.arange(4).to(torch.uint8)
    for out in (torch.empty(4, dtype=torch.float16), torch.empty(5), torch.empty(1, 4)):
        with pytest.raises(ValueError, match="out must be float32 of shape"):
            codes_to_levels(codes, 2, out=out)


def test_endpoint_and_centre_differ_by_one_gain_per_width():
    for bits in WIDTHS:
        codes = torch.arange(2**bits).to(torch.uint8)
        one = torch.tensor(1.0)
        endpoint, centre = dequantize(codes, bits, one), dequantize(codes, bits, one, "centre")
        assert torch.allclose(centre, endpoint * ((2**bits - 1) / 2**bits), atol=1e-6)
        bias = (dequantize(codes, bits, one, "left") - centre).mean().item()
        assert bias == pytest.approx(-1 / 2**bits)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, "4", None, True])
def test_bad_widths_are_named_in_the_error(bits):
    with pytest.raises(ValueError, match=f"from 1 to 8, got {bits!r}"):
        codes_to_levels(torch.zeros(2, dtype=torch.uint8), bits)


def test_unknown_level_is_an_error():
    with pytest.raises(
        ValueError, match="unknown level 'middle'; pass one of endpoint, left, centre"
    ):
        codes_to_levels(torch.zeros(2, dtype=torch.uint8), 4, "middle")
