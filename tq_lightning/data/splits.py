"""The splits of a data set, and the samples of training, validation and test."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tq_lightning.data.sampling import train_or_val_part
from tq_lightning.data.split_folders import missing
from tq_lightning.errors import UserError


@dataclass
class Split:
    """One split of a data set, in memory (`pixels`) or as image files (`read`).

    Attributes:
        classes: class names by index.
        labels: (N,) int64.
        pixels: (N, 3, H, W) uint8, or None.
        read: sample index -> (PIL image, class index), or None.
    """

    classes: list[str]
    labels: Tensor
    pixels: Tensor | None = None
    read: Callable[[int], tuple[Any, int]] | None = None

    def picture(self, n: int) -> tuple[Any, int]:
        """Return (PIL image, class index) from pixels, for timm's transforms of single images."""
        from PIL import Image

        assert self.pixels is not None
        return Image.fromarray(self.pixels[n].permute(1, 2, 0).numpy()), int(self.labels[n])


@dataclass
class Source:
    """Configuration of a reader.

    Attributes:
        root: folder of the data set.
        download: allow the download of a missing data set.
        num_classes: number of classes of synthetic data; None is 10.
        image_size: height and width in pixels.
        path: part of data.name after the /, e.g. hfds/PATH.
        samples: number of synthetic training samples; None is 2048.
        index: class index by name, set by the first split of image files.
        files: splits of image files that were read so far.
    """

    root: Path
    download: bool
    num_classes: int | None
    image_size: int
    samples: int | None
    path: str = ""
    index: dict[str, int] | None = None
    files: dict[str, Split | None] = field(default_factory=dict)


def classes_of(source: Source, labels: Tensor, known: list[str], have: str) -> list[str]:
    """Return the class names of a split whose labels are class indices, and set `source.index`.

    The first split defines the classes.

    Args:
        source: configuration of the reader.
        labels: (N,) int64.
        known: names of the first classes; the others are named by their index.
        have: subject and verb of the error, e.g. "the val split of hfds/PATH has".

    Raises:
        UserError: a label is not among the classes.
    """
    top = int(labels.max())
    if source.index is None:
        count = max(top + 1, source.num_classes or 0, len(known))
        source.index = {(known[n] if n < len(known) else str(n)): n for n in range(count)}
    if top >= len(source.index):
        raise UserError(
            f"{have} the class index {top}, but there are {len(source.index)} classes; "
            "pass data.num_classes"
        )
    return sorted(source.index, key=source.index.__getitem__)


class Splits:
    """The splits of one data set, each read once.

    Args:
        name: name of the data set, for errors.
        read: (source, split) -> Split, or None if the split does not exist.
        source: configuration of the reader.
        val_fraction: fraction of the training split held out for validation if there is no
            validation split.
        samples: number of training samples to use; None uses all.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[Source, str], Split | None],
        source: Source,
        val_fraction: float,
        samples: int | None,
    ) -> None:
        self.name, self.source = name, source
        self.val_fraction, self.samples = val_fraction, samples
        self._read_split = read
        self.loaded: dict[str, Split | None] = {}  # read so far

    def find(self, name: str) -> Split | None:
        """Return the split train, val or test; None if it does not exist."""
        if name not in self.loaded:
            split, expected = self._read_split(self.source, name), self.source.num_classes
            if split is not None and expected not in (None, len(split.classes)):
                raise UserError(
                    f"data.num_classes={expected}, but {self.name} at "
                    f"{self.source.root.absolute()} has {len(split.classes)} classes; pass that "
                    "number, or null"
                )
            self.loaded[name] = split
        return self.loaded[name]

    def __getitem__(self, name: str) -> Split:
        split = self.find(name)
        if split is None:
            raise KeyError(name)
        return split

    def class_names(self) -> list[str]:
        """Return the class names by index, from the first existing split.

        Raises:
            UserError: no split exists.
        """
        for name in ("train", "val", "test"):
            if (split := self.find(name)) is not None:
                return split.classes
        raise UserError(missing(self.source.root, "train", "val", "test"))

    def for_stage(self, stage: str) -> tuple[str, Tensor]:
        """Return (split to read, sample indices) of the stage train, val or test.

        Raises:
            UserError: the split that the stage reads does not exist.
        """
        own = self.find("val") is not None
        if stage == "test":
            name = self._first("test", "val")
        elif stage == "val" and own:
            name = "val"
        else:
            name = self._first("train")
        labels = self[name].labels
        if name != "train":
            return name, torch.arange(labels.numel())
        fraction = None if own else self.val_fraction
        return name, train_or_val_part(labels, stage, fraction, self.samples)

    def _first(self, *names: str) -> str:
        """Return the first of these splits that exists."""
        for name in names:
            if self.find(name) is not None:
                return name
        raise UserError(f"{self.name}: {missing(self.source.root, *names)}")
