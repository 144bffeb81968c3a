"""Index the images in a tar file by byte range."""

import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tq_lightning.data.images import LeftOut, escape_undecodable, is_hidden, reason_to_skip
from tq_lightning.errors import UserError, message_of

# first bytes of gzip, bzip2, xz and zstd
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """Byte range of a file in a tar."""

    offset: int
    size: int


class BoundedFile:
    """Binary file that limits the size of reads to the remaining bytes.

    tarfile otherwise allocates any size that an extended header claims.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        return self.file.read(max(0, min(size, self.size - self.tell())))


def check_not_compressed(path: Path) -> None:
    """Raise UserError for a compressed tar, whose members can't be read by byte range."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError:  # the reader of the tar says why
        return
    if start.startswith(_COMPRESSED):
        raise UserError(
            escape_undecodable(f"{path} is compressed; unpack it, e.g. to a .tar without gzip")
        )


def list_tar(path: Path) -> tuple[dict[PurePosixPath, Member], LeftOut]:
    """List the images of a tar, and of the tars inside it.

    Args:
        path: an uncompressed tar.

    Returns:
        Byte range of each image by its path, and the skipped files.

    Raises:
        UserError: the tar is compressed or damaged, or its member sizes contradict its content.
    """
    members: dict[PurePosixPath, Member] = {}
    left_out = LeftOut()
    check_not_compressed(path)
    try:
        with open(path, "rb") as raw:
            file = BoundedFile(raw, path.stat().st_size)
            _list_members(file, 0, file.size, PurePosixPath(), members, left_out)
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError) as error:
        reason = message_of(error, 100)
        raise UserError(
            escape_undecodable(
                f"{path} can't be read to its end ({reason}); copy or download it again"
            )
        ) from error
    return members, left_out


def _list_members(
    file: "BoundedFile",
    start: int,
    end: int,
    inside: PurePosixPath,
    members: dict[PurePosixPath, Member],
    left_out: LeftOut,
) -> None:
    """List the tar at bytes [start, end) of `file`."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte per file
            first, last = info.offset_data, info.offset_data + info.size
            if info.size < 0 or last > end:
                raise tarfile.ReadError(f"{info.name[:60]!r} extends beyond the end of the file")
            path = inside / info.name.lstrip("/")
            reason = reason_to_skip(path)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                left_out.add("not regular files", path)
            elif path.suffix.lower() == ".tar" and start == 0 and not is_hidden(path.parts):
                _list_members(file, first, last, path.with_suffix(""), members, left_out)
            elif reason is not None:
                left_out.add(reason, path)
            else:
                members[path] = Member(first, info.size)
        check_end(file, tar.offset, end)


def check_end(file: BoundedFile, offset: int, end: int) -> None:
    """Check that only zeros follow the last member of a tar.

    tarfile interprets any data that is not a header as the end of the archive.

    Args:
        file: the tar.
        offset: end of the last member.
        end: end of the tar.

    Raises:
        tarfile.ReadError: other data follows, such as members after a damaged header.
    """
    file.seek(offset)
    remaining = end - file.tell()
    while remaining > 0:
        chunk = file.read(min(remaining, 1 << 20))
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("data after the end of the archive")
        remaining -= len(chunk) or remaining
