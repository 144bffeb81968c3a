"""Write training checkpoints atomically, with a checksum that is verified when they are read."""

import io
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write

# A checkpoint is a zip archive. Its comment, the last bytes of the file, holds the CRC-32 of all
# preceding bytes: torch.load does not verify the checksums of the archive, which cover less.
_MARK = b"tq-crc32:"
_DIGITS = 8
_END = 22 + len(_MARK) + _DIGITS  # the archive's last record with its comment
_BLOCK = 2**22  # bytes


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically.

    A kill or a full disk leaves the old checkpoint. Lightning's writer goes through the folder for
    temporary files. If that is on another file system, its last step is a copy, and a kill during
    the copy leaves a truncated file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint. Raises UserError if it cannot be written."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        archive = _with_checksum(content.getbuffer())
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror})") from error
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for part in archive:
                file.write(part)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint. Raises UserError if it is damaged."""
        verify_checkpoint(path)
        return super().load_checkpoint(path, *args, **kwargs)


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


def _with_checksum(archive: memoryview) -> tuple[bytes | memoryview, ...]:
    """Return the parts of a zip archive with the checksum as its comment.

    The length of the comment is in the last two bytes of the archive.
    """
    comment = (len(_MARK) + _DIGITS).to_bytes(2, "little")
    crc = 0
    for part in (archive[:-2], comment, _MARK):
        crc = zlib.crc32(part, crc)
    return archive[:-2], comment, _MARK, b"%08x" % crc
