"""The energy model against hand-calculated numbers, with counter-examples."""

import pytest

from tq_lightning.cost.energy import ASSUMPTIONS, CONSTANTS_PJ, energy_model


def test_energy_of_one_weight_equals_the_manual_sum():
    four = energy_model(1).by_width[4]
    assert four["refetch_float_pj"] == pytest.approx(650 + 2 * 3.7 + 2 * 0.9 + 4 * 100 / 64)
    assert four["shift_pj"] == pytest.approx(12 * 100 / 64 + 0.03)
    assert four["refetch_planes_pj"] == pytest.approx(4 * 1300 / 64 + 4 * 100 / 64)
    assert four["traffic_float_pj"] == pytest.approx(650)
    assert four["traffic_pj"] == pytest.approx(81.25)


def test_constants_match_the_paper():
    """Horowitz, ISSCC 2014, fig. 1.1.9: memory for 64 bits, arithmetic for one operation."""
    assert CONSTANTS_PJ == {
        "DRAM access, 64 bits": 1300.0,
        "SRAM access (1 MB cache), 64 bits": 100.0,
        "FP32 multiply": 3.7,
        "FP32 add": 0.9,
        "8-bit integer add": 0.03,
    }


def test_energy_grows_with_weights_and_widths():
    one, many = energy_model(1, max_bits=4), energy_model(1000, max_bits=4)
    assert list(one.by_width) == [1, 2, 3, 4]
    for bits, parts in one.by_width.items():
        assert many.by_width[bits] == pytest.approx({name: 1000 * pj for name, pj in parts.items()})


def test_shift_costs_less_than_reading_the_float_weights():
    by_width = energy_model(1).by_width
    assert all(
        20 < parts["refetch_float_pj"] / parts["shift_pj"] < 60 for parts in by_width.values()
    )
    # Counter-example: for a switch to 1 bit, reading its plane from DRAM costs about as much as a
    # shift; to 8 bits, the shift costs far less.
    assert by_width[1]["refetch_planes_pj"] < 2 * by_width[1]["shift_pj"]
    assert by_width[8]["refetch_planes_pj"] > 6 * by_width[8]["shift_pj"]


def test_record_names_the_sources_of_its_constants():
    record = energy_model(7)
    assert record.constants_pj == CONSTANTS_PJ
    assert "fig. 1.1.9" in record.source and "45 nm" in record.source
    assert record.assumptions == list(ASSUMPTIONS) and any(
        "Horowitz" in line for line in ASSUMPTIONS
    )
