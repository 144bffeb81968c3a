"""Codes and levels: exact results at named edges, and the identity that round codes break."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tq_lightning.quant.codes import (
    LEVELS,
    QUANTIZERS,
    codes_to_levels,
    dequantize,
    floor_codes,
    round_codes,
    truncate_codes,
)

WIDTHS = range(1, 9)


def with_neighbors(points: Tensor) -> Tensor:
    """The points and the float32 numbers next to them, clamped to [0, 1]."""
    below, above = points.nextafter(torch.tensor(-1.0)), points.nextafter(torch.tensor(2.0))
    return torch.cat([below, points, above]).clamp(0.0, 1.0)


def hard_values() -> Tensor:
    """Edges and centers of all bins at every width, their neighbors, tiny and random values."""
    points = [torch.arange(513) / 512]
    for bits in WIDTHS:
        top = 2**bits - 1
        points += [torch.arange(2**bits) / top, (torch.arange(top) + 0.5) / top]
    tiny = torch.tensor([0.0, 1e-45, 1e-38, 1e-7, 1 - 2**-24])
    return torch.cat(
        [
            with_neighbors(torch.cat(points)),
            tiny,
            torch.rand(20_000, generator=torch.Generator().manual_seed(0)),
        ]
    )


U = hard_values()

FLOOR_CASES = {  # name -> (u, bits, code)
    "zero": (0.0, 8, 0),
    "one is clamped to the top code": (1.0, 8, 255),
    "one at 1 bit": (1.0, 1, 1),
    "the largest float below one": (1 - 2**-24, 8, 255),
    "an edge belongs to the bin above it": (0.5, 1, 1),
    "just below an edge": (math.nextafter(0.5, 0.0) - 2**-25, 1, 0),
    "the smallest denormal": (1e-45, 8, 0),
    "first edge at 8 bits": (1 / 256, 8, 1),
    "documented, 2 bits": (0.4, 2, 1),
    "documented, 8 bits": (0.4, 8, 102),
    "last bin at 4 bits": (0.95, 4, 15),
}
ROUND_CASES = {
    "zero": (0.0, 8, 0),
    "one": (1.0, 8, 255),
    "a tie goes to the even code, below": (0.5, 1, 0),
    "a tie goes to the even code, above": (0.5, 2, 2),
    "a tie at 8 bits": (0.5, 8, 128),
    "just above a tie": (0.5 + 2**-24, 1, 1),
    "documented, 2 bits": (0.34, 2, 1),
    "documented counter-example, 2 bits": (0.2, 2, 1),
    "documented counter-example, 8 bits": (0.2, 8, 51),
}


@pytest.mark.parametrize("case", FLOOR_CASES)
def test_floor_codes_at_named_edges(case):
    u, bits, code = FLOOR_CASES[case]
    assert floor_codes(torch.tensor(u), bits).item() == code


@pytest.mark.parametrize("case", ROUND_CASES)
def test_round_codes_at_named_edges(case):
    u, bits, code = ROUND_CASES[case]
    assert round_codes(torch.tensor(u), bits).item() == code


@pytest.mark.parametrize("bits", WIDTHS)
def test_floor_codes_equal_the_floor_of_exact_rationals(bits):
    few = U[::37]
    exact = [min(math.floor(Fraction(u) * 2**bits), 2**bits - 1) for u in few.tolist()]
    assert floor_codes(few, bits).tolist() == exact


@pytest.mark.parametrize("bits", WIDTHS)
def test_truncated_floor_codes_equal_floor_codes(bits):
    for stored in range(bits, 9):
        assert torch.equal(floor_codes(U, bits), floor_codes(U, stored) >> (stored - bits))


def test_truncated_round_codes_differ_from_round_codes():
    stored = round_codes(U, 8)
    for bits in range(2, 8):
        share = (round_codes(U, bits) != stored >> (8 - bits)).float().mean().item()
        assert share > 0.1, bits
    differ = round_codes(U, 1) != stored >> 7
    assert differ.any() and (U[differ] == 0.5).all()  # a tie, which rounds to even
    assert torch.equal(round_codes(U, 8), truncate_codes(stored, 8, 8))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_returns_valid_codes(name, bits):
    """Every row returns uint8, uses all codes, is monotone and does not change its input."""
    u = U.clone()
    quantize = QUANTIZERS[name].codes
    codes = quantize(u, bits)
    assert codes.dtype == torch.uint8 and codes.shape == U.shape and torch.equal(u, U)
    assert codes.unique().tolist() == list(range(2**bits))
    assert (codes[U.argsort()].int().diff() >= 0).all()
    assert quantize(torch.tensor([[0.0, 1.0]]), bits).tolist() == [[0, 2**bits - 1]]
    assert quantize(torch.empty(0, 3), bits).shape == (0, 3)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_bin_edges_are_where_the_codes_change(name, bits):
    quantizer = QUANTIZERS[name]
    edge, width = quantizer.edges(U, bits)
    step = 1e-6
    below, above = quantizer.codes(edge - step, bits), quantizer.codes(edge + step, bits)
    assert torch.equal(below + 1, above)
    assert edge.unique().numel() == 2**bits - 1
    u = U
    inside = (u > edge.min()) & (u < edge.max())
    assert ((U - edge).abs()[inside] <= width / 2 + step).all()
    gaps = edge.unique().diff()
    assert gaps.numel() == 0 or torch.allclose(gaps, torch.tensor(width))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_nested_flag_is_true_only_if_codes_nest(name):
    quantizer = QUANTIZERS[name]
    stored = quantizer.codes(U, 8)
    same = [torch.equal(quantizer.codes(U, bits), stored >> (8 - bits)) for bits in WIDTHS]
    assert all(same) == quantizer.nested


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_onnx_form_gives_the_same_codes(name, bits):
    quantizer, top = QUANTIZERS[name], torch.tensor([2.0**bits - 1])
    assert torch.equal(quantizer.float_codes(U, top), quantizer.codes(U, bits).float())


TRUNCATE_CASES = {  # name -> (code, from, to, code after)
    "top code": (255, 8, 1, 1),
    "zero": (0, 8, 1, 0),
    "documented floor": (102, 8, 2, 1),
    "documented round": (51, 8, 2, 0),
    "last code of a bin": (63, 8, 2, 0),
    "first code of the next": (64, 8, 2, 1),
    "no shift": (171, 8, 8, 171),
    "from 4 bits": (11, 4, 2, 2),
}


@pytest.mark.parametrize("case", TRUNCATE_CASES)
def test_truncate_codes_at_named_edges(case):
    code, start, end, result = TRUNCATE_CASES[case]
    got = truncate_codes(torch.tensor([code], dtype=torch.uint8), start, end)
    assert got.dtype == torch.uint8 and got.tolist() == [result]


@pytest.mark.parametrize("middle", WIDTHS)
def test_truncating_twice_equals_truncating_once(middle):
    codes = torch.arange(256).to(torch.uint8)
    for end in range(1, middle + 1):
        assert torch.equal(
            truncate_codes(truncate_codes(codes, 8, middle), middle, end),
            truncate_codes(codes, 8, end),
        )


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, "4", None, True])
def test_bad_widths_are_named_in_the_error(bits):
    codes = torch.zeros(2, dtype=torch.uint8)
    for call in (
        lambda: floor_codes(torch.zeros(2), bits),
        lambda: round_codes(torch.zeros(2), bits),
        lambda: truncate_codes(codes, 8, bits),
        lambda: truncate_codes(codes, bits, 1),
        lambda: codes_to_levels(codes, bits),
    ):
        with pytest.raises(ValueError, match=f"from 1 to 8, got {bits!r}"):
            call()


def test_invalid_truncation_is_an_error():
    codes = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot truncate 4-bit codes to 8 bits"):
        truncate_codes(codes, 4, 8)
    with pytest.raises(TypeError, match=r"uint8, got torch\.int64"):
        truncate_codes(codes.long(), 8, 4)


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


def test_unknown_level_is_an_error():
    with pytest.raises(
        ValueError, match="unknown level 'middle'; pass one of endpoint, left, centre"
    ):
        codes_to_levels(torch.zeros(2, dtype=torch.uint8), 4, "middle")
