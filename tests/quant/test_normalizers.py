"""Non-uniform codes: nesting, slopes as derivatives, and signal-to-noise ratios."""

import math
from dataclasses import replace

import pytest
import torch

from tq_lightning.quant.codes import QUANTIZERS, STORED_BITS, dequantize
from tq_lightning.quant.level_tables import LEVEL_TABLES, level_table
from tq_lightning.quant.normalizers import NORMALIZERS

WIDTHS = range(1, STORED_BITS + 1)
RMS = [name for name, row in NORMALIZERS.items() if row.reference == "rms"]
TABLES = [
    (name, level)
    for name, row in NORMALIZERS.items()
    for level in row.levels or ()
    if level in LEVEL_TABLES
]


def u_of(name, z):
    """Return u of weights z with rms 1 (or with the initial learned range)."""
    row = NORMALIZERS[name]
    r = {"rms": 1.0, "learned": row.span, "max": row.squash(torch.tensor(6.0))}[row.reference]
    return (row.squash(z) * 0.5 / r + 0.5).clamp(0.0, 1.0)


def grid(name):
    """Return weights in multiples of the rms: a dense grid, all bin edges, and their neighbors."""
    row = NORMALIZERS[name]
    z = torch.linspace(-6.0, 6.0, 60_001)
    if row.inverse is not None:
        u = torch.arange(1, 256, dtype=torch.float64) / 256
        edges = row.inverse(u).float()
        less, more = edges.nextafter(edges - 1), edges.nextafter(edges + 1)
        z = torch.cat([z, edges, less, more])
    return torch.cat([z, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30])])


@pytest.mark.parametrize("name", NORMALIZERS)
def test_floor_codes_of_every_normalizer_nest_and_round_codes_do_not(name):
    u = u_of(name, grid(name))
    assert u.min() >= 0 and u.max() <= 1
    for quantizer in QUANTIZERS:
        codes = QUANTIZERS[quantizer].codes
        stored = codes(u, 8)
        nested = [torch.equal(stored >> (8 - n), codes(u, n)) for n in WIDTHS]
        assert all(nested) if quantizer != "round" else not any(nested[1:7])


@pytest.mark.parametrize("name", RMS)
def test_bins_start_at_their_edges(name):
    row = NORMALIZERS[name]
    u = torch.arange(129, 256, dtype=torch.float64) / 256  # the edges of positive weights
    edges = row.inverse(u)
    assert (edges.diff() > 0).all()
    for shift, expected in ((1e-4, 0), (-1e-4, -1)):
        codes = QUANTIZERS["floor"].codes(u_of(name, (edges * (1 + shift)).float()), 8)
        assert torch.equal(codes.long(), torch.arange(129, 256) + expected)
    z = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(row.squash(z), -row.squash(-z))  # odd


@pytest.mark.parametrize("name", RMS)
def test_slope_is_the_derivative(name):
    row = NORMALIZERS[name]
    z = torch.tensor([-3.1, -1.3, -0.4, 0.07, 0.3, 0.9, 1.6, 3.3], dtype=torch.float64)
    numeric = (row.squash(z + 1e-6) - row.squash(z - 1e-6)) / 2e-6
    torch.testing.assert_close(row.slope(row.squash(z)), numeric, rtol=1e-5, atol=1e-9)


def noise(name, level, bits):
    """Return the signal-to-noise ratio in dB for normal weights, from the moments of each bin."""
    row = NORMALIZERS[name]
    edges = row.inverse(torch.arange(2**bits + 1, dtype=torch.float64) / 2**bits)
    edges[0], edges[-1] = -math.inf, math.inf
    density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    moment = torch.where(edges.isinf(), 0.0, edges * density)
    share = torch.special.ndtr(edges).diff()
    first, second = -density.diff(), share - moment.diff()
    codes = torch.arange(2**bits).to(torch.uint8)
    table = level_table(level, name, bits)
    value = dequantize(codes, bits, torch.tensor(row.span), level, table=table).double()
    return -10 * math.log10((second - 2 * value * first + value**2 * share).sum())


NOISE = {  # (normalizer, level) -> dB at 2, 4 and 8 bits
    ("float_e2", "centroid"): (9.30, 19.26, 42.62),
    ("gaussian", "centroid"): (9.05, 20.08, 43.84),
    ("learned", "centroid"): (8.82, 19.65, 29.17),
}


def test_documented_signal_to_noise_of_uniform_and_optimal_codes(monkeypatch):
    wide = replace(NORMALIZERS["learned"], span=4.0, inverse=lambda u: 4.0 * (2.0 * u - 1.0))
    monkeypatch.setitem(NORMALIZERS, "four sigma", wide)
    found = [noise("four sigma", "centroid", bits) for bits in (2, 4, 8)]
    assert found == pytest.approx((6.11, 16.90, 40.72), abs=0.01)
    best = 0.0
    for threshold in torch.linspace(0.9, 1.1, 201).tolist():
        row = replace(wide, span=8.0, inverse=lambda u, t=threshold: (2.0 * u - 1.0) * 2.0 * t)
        monkeypatch.setitem(NORMALIZERS, f"threshold {threshold}", row)
        best = max(best, noise(f"threshold {threshold}", "centroid", 2))
    assert best == pytest.approx(9.30, abs=0.005)
    assert 0 < best - noise("float_e2", "centroid", 2) < 0.005


@pytest.mark.parametrize(("name", "level"), NOISE)
def test_signal_to_noise_on_normal_weights(name, level):
    found = [noise(name, level, bits) for bits in (2, 4, 8)]
    assert found == pytest.approx(NOISE[name, level], abs=0.01)


@pytest.mark.parametrize(("name", "level"), TABLES)
def test_level_tables_are_sorted_and_symmetric(name, level):
    for bits in WIDTHS:
        table = level_table(level, name, bits)
        assert table.dtype == torch.float32 and table.shape == (2**bits,)
        assert (table.diff() >= 0).all() and torch.equal(table + table.flip(0), torch.ones(2**bits))
    assert level_table(level, name, 8).unique().numel() >= 255


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [j / 8 for j in range(8)] + [2.0**e * (1 + m / 8) for e in range(3) for m in range(8)]


@pytest.mark.parametrize(("bits", "magnitudes"), [(4, E2M1), (6, E2M3)])
def test_shifted_float_codes_are_the_floats_of_the_microscaling_formats(bits, magnitudes):
    codes = torch.arange(256).to(torch.uint8) >> (8 - bits)
    table = level_table("native", "float_e2", bits)
    got = dequantize(codes, bits, torch.tensor(8.0), table=table).unique()  # 8 is 4 rms
    assert got.tolist() == [-m for m in reversed(magnitudes[1:])] + magnitudes
