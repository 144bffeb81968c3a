"""Activation codes: the rounding that integer kernels compute."""

from dataclasses import replace

import pytest
import torch

from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.integer.activations import rounding_of


@pytest.mark.parametrize("quantizer", ["floor", "round"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_rounding_gives_the_same_codes_away_from_edges(quantizer, bits):
    """The rounding of integer kernels gives the same codes away from bin edges."""
    u = (torch.arange(5000, dtype=torch.float64) + 0.37) / 5000
    steps, offset = rounding_of(quantizer, bits)
    made = (u * steps + offset).round().clamp(0, 2**bits - 1)
    other = (u * steps).round().clamp(0, 2**bits - 1)
    assert torch.equal(made, QUANTIZERS[quantizer].codes(u.float(), bits).double())
    assert torch.equal(made, other) == (quantizer == "round")


def test_quantizer_without_a_rounding_form_is_an_error(monkeypatch):
    row = replace(QUANTIZERS["floor"], rounding=None)
    monkeypatch.setitem(QUANTIZERS, "uneven", row)
    with pytest.raises(ValueError, match="'uneven' has no rounding form"):
        rounding_of("uneven", 4)
