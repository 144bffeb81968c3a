"""Bit planes: codes of k bits <-> k planes of one bit a code, most significant first, in plain NumPy.

Plane p holds bit k-1-p of every code, eight codes a byte, the first code in the highest bit (`numpy.packbits` order). The
first n planes alone are the codes shifted right by k-n: a narrower model is a prefix of the planes.

The work is done in blocks that stay in a core's second-level cache, with whole-array operations that NumPy vectorises.
"""

from collections.abc import Sequence

import numpy as np

from tq_lightning.quant.codes import STORED_BITS

BLOCK = 1 << 18  # codes; one block of codes and its scratch are half a megabyte
ALIGN = 64  # codes; every layer begins on a whole byte of every plane, and on a whole 64-bit word


def aligned(count: int) -> int:
    """Codes that a layer of `count` codes takes in the row of all layers, with the gap behind it."""
    return -(-count // ALIGN) * ALIGN


def plane_bytes(count: int) -> int:
    """Bytes of one plane of `count` codes."""
    return (count + 7) // 8


def pack_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes -> planes.

    Args:
        codes: uint8 (count,), each below 2^bits.
        bits: width k of the codes, 1..8.

    Returns:
        uint8 (k, ceil(count / 8)), most significant plane first; the bits behind the last code are 0.

    Raises:
        ValueError: `codes` are not a row of uint8, `bits` is out of range, or a code does not fit it.
    """
    _check(codes, bits)
    if bits < STORED_BITS and codes.size and int(codes.max()) >> bits:
        raise ValueError(
            f"a code of {int(codes.max())} does not fit {bits} bits; pass bits={int(codes.max()).bit_length()}"
        )
    planes = np.empty((bits, plane_bytes(codes.size)), np.uint8)
    scratch = np.empty(min(BLOCK, codes.size), np.uint8)
    for start in range(0, codes.size, BLOCK):
        block = codes[start : start + BLOCK]
        at = slice(start // 8, start // 8 + plane_bytes(block.size))
        for p in range(bits):
            # packbits takes any value but 0 for a one, so the bit need not be moved down first
            one = np.bitwise_and(block, 1 << (bits - 1 - p), out=scratch[: block.size])
            planes[p, at] = np.packbits(one)
    return planes


def unpack_planes(
    planes: Sequence[np.ndarray] | np.ndarray, count: int, out: np.ndarray | None = None
) -> np.ndarray:
    """The first n planes -> codes of width n.

    Args:
        planes: n rows, 1..8, of ceil(count / 8) bytes each, most significant first.
        count: number of codes.
        out: uint8 (count,) to write to; or None. Codes in it are not read.

    Returns:
        uint8 (count,), `out` where given. Equal to the stored codes shifted right by the number of planes left out.

    Raises:
        ValueError: no planes or more than 8, or a plane of another length.
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
            np.add(
                block, block, out=block
            )  # one bit to the left; NumPy's uint8 shift is many times slower
            np.bitwise_or(block, np.unpackbits(plane[at], count=block.size), out=block)
    return out


def _check(codes: np.ndarray, bits: int) -> None:
    if codes.dtype != np.uint8 or codes.ndim != 1:
        raise ValueError(f"codes must be a row of uint8, got {codes.dtype} of shape {codes.shape}")
    if not 1 <= bits <= STORED_BITS:
        raise ValueError(f"planes of 1 to {STORED_BITS} bits, got {bits}")
