"""Sums of products in 16 bits: none overflows, and split weights are exact."""

import pytest
import torch
from fixtures.codes import SCALES, WIDTHS, all_codes

from tq_lightning.quant.codes import LEVELS
from tq_lightning.quant.integer.arithmetic import integer_weight
from tq_lightning.quant.integer.saturation import (
    INT16_MAX,
    SPLIT,
    activation_top,
    largest_integer,
    split_weight,
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_split_weights_are_exact_and_do_not_saturate(bits, level):
    """For all codes and signs, products with 255 fit 16 bits, unlike those of k'."""
    codes = all_codes(bits).expand(len(SCALES), -1)
    got = split_weight(codes, bits, SCALES[:, None], level)
    unsplit = integer_weight(codes, bits, SCALES[:, None], level, exact=True)
    assert all(part.dtype == torch.int8 for part in got.parts) and (got.gain > 0).all()
    high, low = (part.int() for part in got.parts)
    assert torch.equal(SPLIT * high + low, got.codes.int())
    expected = unsplit.gain * (unsplit.codes.double() + unsplit.offset)
    assert torch.allclose(got.gain * got.codes.double(), expected, rtol=0, atol=1e-14)
    for part in (high, low):
        assert 2 * 255 * int(part.abs().max()) <= INT16_MAX
    assert bits < 8 or 2 * 255 * int(unsplit.codes.abs().int().max()) > INT16_MAX


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_sum_of_two_products_fits_16_bits(bits, level):
    """The 16-bit sums of a processor without VNNI never saturate."""
    largest = integer_weight(all_codes(bits), bits, torch.tensor([[1.0], [-1.0]]), level).codes
    assert largest.int().abs().max() == largest_integer(bits, level)
    top = activation_top(bits, level, exact_sums=False)
    assert 2 * top * largest_integer(bits, level) <= INT16_MAX
    assert top == (127 if bits == 8 or (bits == 7 and level != "left") else 255)
    assert top == 255 or 2 * 255 * largest_integer(bits, level) > INT16_MAX
    assert activation_top(bits, level) == 255
