"""Bit planes: k-bit codes <-> k planes of one bit per code, in plain NumPy.

Planes are ordered most significant first. Plane p holds bit k-1-p of every code, eight codes per
byte, with the first code in the highest bit (the order of `numpy.packbits`). The first n planes
are the codes shifted right by k-n, so a narrower model is a prefix of the planes.

The functions work on blocks that fit a core's L2 cache, with vectorized NumPy operations.
"""

from collections.abc import Sequence

import numpy as np

from tq_lightning.quant.codes import STORED_BITS

BLOCK = 1 << 18  # codes; a block and its scratch memory take half a megabyte
ALIGN = 64  # codes; every layer starts at a 64-bit word of every plane


def aligned(count: int) -> int:
    """Round `count` codes up to the next layer boundary."""
    return -(-count // ALIGN) * ALIGN


def plane_bytes(count: int) -> int:
    """Return the bytes of one plane of `count` codes."""
    return (count + 7) // 8


def pack_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes into bit planes.

    Args:
        codes: uint8 (count,), each below 2^bits.
        bits: width k of the codes, 1..8.

    Returns:
        uint8 (k, ceil(count / 8)), most significant plane first. Padding bits are 0.

    Raises:
        ValueError: `codes` is not one-dimensional uint8, `bits` is out of range, or a code does not
            fit into `bits`.
    """
    _check(codes, bits)
    if bits < STORED_BITS and codes.size and int(codes.max()) >> bits:
        raise ValueError(
            f"a code of {int(codes.max())} does not fit {bits} bits; "
            f"pass bits={int(codes.max()).bit_length()}"
        )
    planes = np.empty((bits, plane_bytes(codes.size)), np.uint8)
    scratch = np.empty(min(BLOCK, codes.size), np.uint8)
    for start in range(0, codes.size, BLOCK):
        block = codes[start : start + BLOCK]
        at = slice(start // 8, start // 8 + plane_bytes(block.size))
        for p in range(bits):
            # packbits reads any nonzero value as a one, so the bit need not be shifted down
            one = np.bitwise_and(block, 1 << (bits - 1 - p), out=scratch[: block.size])
            planes[p, at] = np.packbits(one)
    return planes


def unpack_planes(
    planes: Sequence[np.ndarray] | np.ndarray, count: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Unpack the first n planes into codes of width n.

    Args:
        planes: 1 to 8 rows of ceil(count / 8) bytes each, most significant first.
        count: number of codes.
        out: uint8 (count,) to write to, or None.

    Returns:
        uint8 (count,), `out` if it was given: the stored codes shifted right by the number of
        missing planes.

    Raises:
        ValueError: there are no planes or more than 8, or a plane has another length.
    """
    out = np.empty(count, np.uint8) if out is None else out
    _check(out, len(planes))
    for plane in planes:
        if plane.dtype != np.uint8 or plane.shape != (plane_bytes(out.size),):
            raise ValueError(
                f"a plane of {out.size} codes is {plane_bytes(out.size)} bytes, got {plane.shape}"
            )
    for start in range(0, out.size, BLOCK):
        block = out[start : start + BLOCK]
        at = slice(start // 8, start // 8 + plane_bytes(block.size))
        block[:] = np.unpackbits(planes[0][at], count=block.size)
        for plane in planes[1:]:
            # a shift to the left; NumPy's own shift of uint8 is many times slower
            np.add(block, block, out=block)
            np.bitwise_or(block, np.unpackbits(plane[at], count=block.size), out=block)
    return out


def _check(codes: np.ndarray, bits: int) -> None:
    if codes.dtype != np.uint8 or codes.ndim != 1:
        raise ValueError(
            f"codes must be one-dimensional uint8, got {codes.dtype} of shape {codes.shape}"
        )
    if not 1 <= bits <= STORED_BITS:
        raise ValueError(f"expected 1 to {STORED_BITS} planes, got {bits}")
