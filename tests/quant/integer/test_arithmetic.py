"""Integer weights: all codes, widths and levels against exact rationals; signs and saturation."""

from fractions import Fraction

import pytest
import torch
from fixtures.codes import SCALES, WIDTHS, all_codes

from tq_lightning.quant.codes import LEVELS, dequantize, truncate_codes
from tq_lightning.quant.integer.arithmetic import (
    bias_factors,
    integer_weight,
    signed_codes,
    signed_level,
)
from tq_lightning.quant.integer.saturation import largest_integer


def exact_weight(k, bits, level):
    """Return 2 level - 1 as an exact rational."""
    top = 2**bits - 1
    value = {"endpoint": Fraction(k, top), "left": Fraction(k, top + 1)}
    value["centre"] = Fraction(2 * k + 1, 2 * (top + 1))
    return 2 * value[level] - 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_arithmetic_shift_truncates_signed_codes(bits):
    stored = all_codes(8)
    narrow = signed_codes(truncate_codes(stored, 8, bits), bits)
    assert narrow.dtype == torch.int8
    assert torch.equal(narrow, signed_codes(stored, 8) >> (8 - bits))
    logical = (signed_codes(stored, 8).view(torch.uint8) >> (8 - bits)).view(torch.int8)
    assert bits == 8 or not torch.equal(narrow, logical)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_step_and_offset_give_the_level_of_every_code(bits, level):
    step, offset = signed_level(bits, level)
    for k in range(2**bits):
        exact = exact_weight(k, bits, level)
        assert abs(Fraction(step) * (k - 2 ** (bits - 1) + Fraction(offset)) - exact) < 1e-15


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_integer_weights_equal_exact_weights_for_all_codes_and_signs(bits, level, exact):
    """gain * (codes + offset) equals the weight, or the result is marked as rounded."""
    codes = all_codes(bits).expand(len(SCALES), -1)
    scale = SCALES[:, None]
    got = integer_weight(codes, bits, scale, level, exact)
    assert got.codes.dtype == torch.int8 and (got.gain > 0).all()
    ideal = torch.tensor(
        [[float(s) * float(exact_weight(k, bits, level)) for k in range(2**bits)] for s in SCALES],
        dtype=torch.float64,
    )
    rebuilt = got.gain * (got.codes.double() + got.offset)
    error = (rebuilt - ideal).abs()
    clamped = level == "left" and bits == 8 and not exact
    assert got.exact == (exact or bits < 8)
    if got.exact:
        assert (error <= 1e-14).all()
    elif clamped:  # the one code that int8 cannot negate
        assert (error > 1e-14).nonzero().tolist() == [[1, 0], [3, 0]]
    else:  # half a step of 1/127
        assert error.max() > 1e-3
        assert (error <= scale.abs() * (0.5 / 127 + 1e-12)).all()
    assert (got.offset == 0).all() or (exact and bits == 8)
    zero = SCALES == 0
    assert (rebuilt[zero] == 0).all() and (got.gain.expand(len(SCALES), 1)[zero] == 1).all()
    as_trained = dequantize(codes, bits, scale.float(), level).double()
    assert torch.allclose(as_trained, ideal, atol=1e-6)
    assert got.codes.abs().int().max() <= largest_integer(bits, level)


def test_left_levels_with_positive_scale_are_exact_at_8_bits():
    assert integer_weight(all_codes(8), 8, torch.tensor(2.0), "left").exact


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_4_bit_weights_fit_int4(bits, level):
    """With the default largest integer, odd 4-bit codes do not fit."""
    codes = all_codes(bits).expand(len(SCALES), -1)
    odd = integer_weight(codes, bits, SCALES[:, None], level, exact=True)
    got = integer_weight(codes, bits, SCALES[:, None], level, exact=True, largest=7)
    assert got.exact and int(got.codes.min()) >= -8 and int(got.codes.max()) <= 7
    rebuilt, same = (w.gain * (w.codes.double() + w.offset) for w in (got, odd))
    assert torch.allclose(rebuilt, same, rtol=0, atol=1e-14)
    assert (int(odd.codes.max()) > 7) == (bits == 4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bias_factors_make_the_bias_nearly_an_integer(bits):
    codes = integer_weight(all_codes(bits).expand(500, -1), bits, torch.tensor(3.0)).codes
    steps = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50
    factors = bias_factors(codes, steps, 64)
    assert int((codes.int() * factors[:, None]).abs().max()) <= 64 and int(factors.min()) >= 1
    error = [((steps * f).round() / f - steps).abs().mean() for f in (1, factors)]
    assert error[1] < error[0] / 64 * (2**bits)
    largest = codes.int().abs().max()
    assert factors.max() <= 64 // largest and bias_factors(codes, 0 * steps + 2**31).max() == 1


def test_bias_factors_of_wide_codes_are_one():
    codes, steps = torch.full((3, 2), -128, dtype=torch.int8), torch.tensor([0.3, 0.0, 7.5])
    assert bias_factors(codes, steps.double(), 64).tolist() == [1, 1, 1]
    assert bias_factors(torch.full((1, 2), 3, dtype=torch.int8), torch.tensor([1.4])).tolist() == [
        5
    ]


def test_documented_example():
    got = integer_weight(all_codes(2), 2, torch.tensor(3.0))
    assert got.codes.tolist() == [-3, -1, 1, 3] and got.gain.item() == pytest.approx(1.0)


@pytest.mark.parametrize("level", ["endpoint", "centre"])
def test_half_step_term_depends_on_the_input(level):
    """Dropping it or replacing it by a constant changes products, so a bias cannot replace it."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (50,), generator=generator).to(torch.uint8)
    a = torch.randint(0, 256, (20, 50), generator=generator).double()
    got = integer_weight(codes, 8, torch.tensor(1.0), level, exact=True)
    products, sums = a @ got.codes.double(), a.sum(1)
    exact = a @ torch.tensor([float(exact_weight(int(k), 8, level)) for k in codes], dtype=a.dtype)
    assert torch.allclose(got.gain * (products + got.offset * sums), exact, rtol=1e-12)
    left_out = exact - got.gain * products
    assert left_out.std() > 100 * got.gain and left_out.min() > 0  # in steps of the product


def test_scale_that_underflows_in_float32_is_treated_as_zero():
    got = integer_weight(all_codes(4), 4, torch.tensor(1e-300, dtype=torch.float64))
    assert (got.codes == 0).all() and got.gain == 1 and got.offset == 0


def test_invalid_input_is_an_error(monkeypatch):
    codes, one = all_codes(4), torch.tensor(1.0)
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        integer_weight(codes, 9, one)
    with pytest.raises(ValueError, match="'middle' has no integer form; pass one of endpoint"):
        integer_weight(codes, 4, one, "middle")
    with pytest.raises(ValueError, match="NaN or infinity"):
        integer_weight(codes, 4, torch.tensor(torch.nan))
    row = LEVELS["endpoint"]
    monkeypatch.setitem(LEVELS, "square", lambda k, top: row(k, top).square())
    with pytest.raises(ValueError, match="'square' is not evenly spaced"):
        integer_weight(codes, 4, one, "square")
