"""The checksum of a training checkpoint: written at its end, verified whenever it is read."""

import io
import zlib
from pathlib import Path

from tq_lightning.errors import UserError

# A checkpoint is a zip archive. Its comment, the last bytes of the file, holds the CRC-32 of all
# preceding bytes: torch.load does not verify the checksums of the archive, which cover less.
_MARK = b"tq-crc32:"
_DIGITS = 8
_END = 22 + len(_MARK) + _DIGITS  # the archive's last record with its comment
_BLOCK = 2**22  # bytes


def verify_checkpoint(path: str | Path) -> None:
    """Compare a checkpoint with its checksum; one written without a checksum is accepted.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - _END))
            end = file.read()
            comment = end[-len(_MARK) - _DIGITS :]
            if not (comment.startswith(_MARK) or end.startswith(b"PK\5\6")):
                return
            file.seek(0)
            left, crc = size - _DIGITS, 0
            while left and (block := file.read(min(_BLOCK, left))):
                crc, left = zlib.crc32(block, crc), left - len(block)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror})") from error
    if comment != _MARK + b"%08x" % crc:
        raise UserError(
            f"checkpoint {path} is damaged (wrong checksum); pass another one, "
            "e.g. the best or last checkpoint of the run"
        )


def with_checksum(archive: memoryview) -> tuple[bytes | memoryview, ...]:
    """Return the parts of a zip archive with the checksum as its comment.

    The length of the comment is in the last two bytes of the archive.
    """
    comment = (len(_MARK) + _DIGITS).to_bytes(2, "little")
    crc = 0
    for part in (archive[:-2], comment, _MARK):
        crc = zlib.crc32(part, crc)
    return archive[:-2], comment, _MARK, b"%08x" % crc
