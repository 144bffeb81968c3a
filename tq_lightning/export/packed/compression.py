"""Lossless compression of bit planes: one zstd frame per plane, so a prefix stays readable.

Codes cluster around the middle of their range, where 10000xxx and 01111xxx are neighbors. Each
single plane therefore looks like noise. An XOR with plane 0 turns the other planes into the bits
of the distance from the middle, whose high bits are mostly 0 and compress well. Every reader loads
plane 0 anyway.
"""

import numpy as np
import zstandard

from tq_lightning.errors import UserError

CODING = "zstd-xor0"  # value of "compression" in the header
LEVEL = 19  # the slowest ordinary level of zstd: a file is written once and read often


def compress_plane(plane: np.ndarray, first: np.ndarray | None) -> np.ndarray:
    """Compress one plane to a zstd frame.

    Args:
        plane: uint8 (bytes,).
        first: plane 0, or None if `plane` is plane 0.

    Returns:
        uint8 (frame bytes,).
    """
    raw = plane if first is None else plane ^ first
    return np.frombuffer(zstandard.ZstdCompressor(level=LEVEL).compress(raw.tobytes()), np.uint8)


def decompress_plane(frame: np.ndarray, first: np.ndarray | None, size: int) -> np.ndarray:
    """Decompress a zstd frame without ever allocating more than `size` bytes for it.

    Args:
        frame: uint8 (frame bytes,).
        first: plane 0, or None if `frame` holds plane 0.
        size: size of a plane in bytes.

    Returns:
        uint8 (size,).

    Raises:
        UserError: the frame is invalid or holds another number of bytes.
    """
    data = frame.tobytes()
    try:
        if zstandard.frame_content_size(data) != size:
            raise UserError(f"a compressed plane does not decompress to {size} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise UserError(f"a compressed plane can't be decompressed ({error})") from error
    plane = np.frombuffer(raw, np.uint8)
    return plane if first is None else plane ^ first
