"""Write training checkpoints atomically, with a checksum that is verified when they are read."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write
from tq_lightning.models.checkpoint_checksum import verify_checkpoint, with_checksum


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically.

    If the process is killed or the disk is full, the old checkpoint remains. Lightning's writer
    uses the folder for temporary files. If that folder is on another file system, its last step is
    a copy, and a kill during the copy leaves a truncated file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint. Raises UserError if it cannot be written."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        archive = with_checksum(content.getbuffer())
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
