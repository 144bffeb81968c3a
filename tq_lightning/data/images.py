"""Find image files, and decode them to 8-bit RGB.

Training, evaluation and `classify` share this module, so that they read the same files identically.
"""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tq_lightning.errors import UserError, message_of

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".apng", ".avif", ".jp2", ".j2k", ".tga",
)  # fmt: skip
# Images that Pillow does not read. They are counted separately, so that a class of only such files
# is an error.
_UNREAD_SUFFIXES = {
    ".heic", ".heif", ".jxl", ".svg", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".dcm",
}  # fmt: skip
UNREAD = "images in unsupported formats"
# Names of file managers, NAS systems and archivers. Names that begin with "." (hidden files) or "@"
# (@eaDir, @Recycle, @tmp and others of NAS systems) are skipped too.
_SYSTEM_NAMES = {
    "#recycle", "#snapshot", "~snapshot", "__macosx", "__pycache__", "lost+found", "_gsdata_",
    "$recycle.bin", "system volume information", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
_EIGHT_BIT = {"1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value
_MAX_RATIO = 1000  # of the sides: resizing the short side to 224 would give 50 megapixels
_INDIRECT = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}  # mode -> mode that converts directly


class UnreadableImage(UserError):
    """A file that can't be decoded, or whose pixels have no defined 8-bit form."""


class LeftOut:
    """Skipped files of a data set, counted by reason, with an example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.folders: dict[str, set[str]] = {}  # reason -> names of parent folders

    def add(self, reason: str, path: PurePosixPath) -> None:
        """Count one file."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, str(path))
        self.folders.setdefault(reason, set()).add(path.parent.name)

    def __str__(self) -> str:
        parts = [f"{n} {reason} ({self.examples[reason]})" for reason, n in self.counts.items()]
        return escape_undecodable(f"skipped {self.counts.total()}: {', '.join(parts)}")


def escape_undecodable(text: str) -> str:
    """Replace bytes of file names that are not UTF-8, so that the text can be printed anywhere."""
    return text.encode("utf-8", "backslashreplace").decode()


def report(line: str) -> None:
    """Print a line about a data set on standard error, on the first rank only."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # `classify` does not need it

    if getattr(rank_zero_only, "rank", 0) == 0:
        print(escape_undecodable(line), file=sys.stderr, flush=True)


def is_hidden(parts: tuple[str, ...]) -> bool:
    """Return True if any part of a relative path is hidden or belongs to a file manager or NAS."""
    return any(part.startswith((".", "@")) or part.lower() in _SYSTEM_NAMES for part in parts)


def reason_to_skip(path: PurePosixPath) -> str | None:
    """Return the reason to skip a file, judged by its relative path; None for an image."""
    if path.name.startswith("._"):
        return "macOS companion files"
    if is_hidden(path.parts):
        return "in hidden or system folders"
    if path.suffix.lower() in _UNREAD_SUFFIXES:
        return UNREAD
    if path.suffix.lower() not in SUFFIXES:
        return "not images"
    return None


def list_images(root: Path) -> tuple[list[PurePosixPath], LeftOut]:
    """List the images below a folder, at any depth. Symbolic links are followed.

    Args:
        root: folder to search.

    Returns:
        Relative paths in no particular order, and the skipped files.

    Raises:
        UserError: a folder can't be read.
    """
    found: list[PurePosixPath] = []
    left_out = LeftOut()
    for path, problem in _walk(root, PurePosixPath(), ()):
        reason = reason_to_skip(path) or problem
        if reason is None:
            found.append(path)
        else:
            left_out.add(reason, path)
    return found, left_out


def _walk(
    root: Path, inside: PurePosixPath, ancestors: tuple[tuple[int, int], ...]
) -> Iterator[tuple[PurePosixPath, str | None]]:
    """Yield (relative path, reason why it can't be opened or None) of all files."""
    folder = root / inside
    try:
        info = folder.stat()
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            escape_undecodable(f"can't read folder {folder} ({error.strerror})")
        ) from error
    identity = (info.st_dev, info.st_ino)
    if identity in ancestors:  # a link to a folder above
        return
    for entry in listed:
        path = inside / entry.name
        if entry.is_dir():
            yield from _walk(root, path, (*ancestors, identity))
        elif entry.is_file():
            yield path, None
        else:  # opening a FIFO would wait forever
            yield path, "broken links" if entry.is_symlink() else "not regular files"


def read_image(source: str | Path | IO[bytes], mode: str = "RGB") -> Any:
    """Decode an image file to 8 bits per channel.

    16-bit gray values are divided by 257, so that 65535 becomes 255, and 12-bit ones by their own
    maximum. Transparency and the orientation in EXIF are ignored, as in timm and torchvision. Only
    the first frame of an animation is read.

    Args:
        source: a path or an open file.
        mode: "RGB", or "L" for a gray image.

    Returns:
        A PIL image of mode `mode`.

    Raises:
        UnreadableImage: the file is damaged, not an image, too large, or has a pixel type without
            a defined 8-bit form. The message does not name the file.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow raises an error at twice the size that it warns about
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(source) as image:
                _check_ratio(image.size)
                image.load()
                return _to_8_bits(image).convert(mode)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        reason = message_of(error, 100) or type(error).__name__
        raise UnreadableImage(f"can't be read as an image ({reason})") from error


def _check_ratio(size: tuple[int, int]) -> None:
    if max(size) > _MAX_RATIO * min(size):
        raise UnreadableImage(
            f"has {size[0]} x {size[1]} pixels, and sides with a ratio above {_MAX_RATIO} can't be "
            "resized to an input"
        )


def _to_8_bits(image: Any) -> Any:
    """Convert an image to one of the 8-bit modes that convert directly to RGB and L."""
    mode, kind = image.mode, image.format
    if mode in _EIGHT_BIT:
        # a palette may have transparency per entry, which only RGBA separates from the colors
        return image.convert("RGBA") if mode in ("P", "PA") else image
    if mode in _INDIRECT:
        return image.convert(_INDIRECT[mode])
    # Pillow reads 16-bit PNM, and in old versions PNG, as 32-bit integers
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):
        return _from_16_bits(image)
    raise UnreadableImage(
        f"has pixel type {mode!r}, which has no defined 8-bit form; save it as 8- or 16-bit"
    )


def _from_16_bits(image: Any) -> Any:
    import numpy as np
    from PIL import Image

    # Pillow keeps the values of a 12-bit TIFF, and of one whose zero is white
    tags = image.tag_v2 if image.format == "TIFF" else {}
    top = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    values = np.asarray(image).astype(np.float32).clip(0, top)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = top - values
    return Image.fromarray(np.rint(values / (top / 255)).astype(np.uint8))
