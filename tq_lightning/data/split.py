"""Split: one split of a data set; Source: where a reader finds it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Split:
    """One split of a data set, in memory (`pixels`) or as image files (`read`).

    Attributes:
        classes: class names by number.
        labels: (N,) int64.
        pixels: (N, 3, H, W) uint8, or None.
        read: sample number -> (PIL image, class number), or None.
    """

    classes: list[str]
    labels: Tensor
    pixels: Tensor | None = None
    read: Callable[[int], tuple[Any, int]] | None = None

    def picture(self, n: int) -> tuple[Any, int]:
        """Make (PIL image, class number) from pixels, for timm's transforms of single images."""
        from PIL import Image

        assert self.pixels is not None
        return Image.fromarray(self.pixels[n].permute(1, 2, 0).numpy()), int(self.labels[n])


@dataclass
class Source:
    """Configuration of a reader.

    Attributes:
        root: folder of the data set.
        download: whether a missing data set may be downloaded.
        num_classes: number of classes of synthetic data; None is 10.
        image_size: height and width in pixels.
        samples: number of synthetic training samples; None is 2048.
        index: class numbers by name, once the first split of image files was read.
        files: splits of image files that were read.
    """

    root: Path
    download: bool
    num_classes: int | None
    image_size: int
    samples: int | None
    index: dict[str, int] | None = None
    files: dict[str, Split | None] = field(default_factory=dict)
