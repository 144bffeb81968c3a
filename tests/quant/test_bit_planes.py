"""Bit planes: exact on odd lengths, most significant first, and a prefix is a right shift."""

import numpy as np
import pytest

from tq_lightning.quant.bit_planes import BLOCK, pack_planes, plane_bytes, unpack_planes


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001, BLOCK, BLOCK + 3])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_round_trip_is_exact_and_a_prefix_is_a_right_shift(count, bits):
    codes = np.random.default_rng(count).integers(0, 2**bits, count, dtype=np.uint8)
    planes = pack_planes(codes, bits)
    assert planes.shape == (bits, plane_bytes(count))
    for n in range(1, bits + 1):
        np.testing.assert_array_equal(unpack_planes(planes[:n], count), codes >> (bits - n))


def test_first_code_is_the_highest_bit_of_the_first_byte():
    # 0b10000001, then seven zeros: the highest bit of the first and of the last plane
    codes = np.array([0b10000001, 0, 0, 0, 0, 0, 0, 1, 255], np.uint8)
    planes = pack_planes(codes, 8)
    assert planes[0].tolist() == [0x80, 0x80]
    assert planes[1].tolist() == [0x00, 0x80]
    assert planes[7].tolist() == [0x81, 0x80]


def test_wrong_plane_order_gives_other_codes():
    codes = np.arange(256, dtype=np.uint8)
    planes = pack_planes(codes, 8)
    assert not np.array_equal(unpack_planes(planes[::-1].copy()[:4], 256), codes >> 4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pack_planes(np.array([4], np.uint8), 2), "does not fit 2 bits"),
        (lambda: pack_planes(np.zeros((2, 2), np.uint8), 8), "one-dimensional uint8"),
        (lambda: pack_planes(np.zeros(2, np.int8), 8), "one-dimensional uint8"),
        (lambda: pack_planes(np.zeros(2, np.uint8), 9), "1 to 8"),
        (lambda: unpack_planes([np.zeros(3, np.uint8)], 8), "is 1 bytes"),
        (lambda: unpack_planes([], 8), "1 to 8"),
    ],
)
def test_invalid_planes_are_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
