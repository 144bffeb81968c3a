"""Lossless compression of bit planes: one zstd frame a plane, so that a prefix of planes stays readable by itself.

Codes crowd around the middle of their range, where 10000xxx and 01111xxx are neighbours: each plane by itself looks like
noise. XORed with plane 0, planes 1, 2, ... become the bits of the distance from the middle, whose high bits are mostly 0;
those shrink. Plane 0 is needed by every reader anyway.
"""

import numpy as np
import zstandard

from tq_lightning.errors import UserError

CODING = "zstd-xor0"  # the name in the header
LEVEL = 19  # zstd's slowest ordinary level: written once, read often


def compress_plane(plane: np.ndarray, first: np.ndarray | None) -> np.ndarray:
    """One plane -> its zstd frame. `first` is plane 0, or None for plane 0 itself. Both uint8 (bytes,)."""
    raw = plane if first is None else plane ^ first
    return np.frombuffer(zstandard.ZstdCompressor(level=LEVEL).compress(raw.tobytes()), np.uint8)


def decompress_plane(frame: np.ndarray, first: np.ndarray | None, size: int) -> np.ndarray:
    """A zstd frame -> the plane of `size` bytes. Nothing larger than `size` is ever allocated.

    Raises:
        UserError: not a frame, or one of another size.
    """
    data = frame.tobytes()
    try:
        if zstandard.frame_content_size(data) != size:
            raise UserError(
                f"a compressed plane unfolds to another size than the {size} bytes of a plane"
            )
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise UserError(f"a compressed plane does not unfold ({error})") from error
    plane = np.frombuffer(raw, np.uint8)
    return plane if first is None else plane ^ first
