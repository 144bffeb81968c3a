"""Labeled time series from the data files of the aeon package.

`aeon_series` is a factory: `data.name: tq_lightning.data.timeseries:aeon_series`.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tq_lightning.errors import UserError
from tq_lightning.package_data import package_folder

# lines of the header that are read as something else, if their value is true
UNSUPPORTED = {
    "@targetlabel": "the series have numbers to predict instead of classes",
    "@timestamps": "the values are pairs of time and value",
}


class Series:
    """Series with labels, padded with zeros at the end.

    Item: ((x (channels, steps) float32, length), label). The collated batch is
    ([x, lengths], labels).

    Args:
        series: one array (channels, steps of the sample) per sample.
        labels: class indices.
        classes: class names by index.
        steps: length to pad to.
        mean: (channels,), subtracted from the series.
        std: (channels,), by which the series are divided.
    """

    def __init__(
        self,
        series: list[np.ndarray],
        labels: list[int],
        classes: list[str],
        steps: int,
        mean: np.ndarray,
        std: np.ndarray,
    ) -> None:
        self.labels, self.classes = labels, classes
        self.lengths = [s.shape[1] for s in series]
        self.x = torch.zeros(len(series), series[0].shape[0], steps)
        for n, s in enumerate(series):
            self.x[n, :, : s.shape[1]] = torch.from_numpy((s - mean[:, None]) / std[:, None])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[tuple[Tensor, int], int]:
        return (self.x[number], self.lengths[number]), self.labels[number]


def read_ts(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """Read a .ts file of labeled series: channels separated by colons, with the class at the end.

    Returns:
        One float32 array (channels, steps) per series, and the class of each.

    Raises:
        UserError: the file does not have this format, or its series have no classes.
    """
    series, labels, data = [], [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not data:
            key, _, value = line.lower().partition(" ")
            if key in UNSUPPORTED and value.strip().startswith("true"):
                raise UserError(
                    f"{path}: {line!r} means that {UNSUPPORTED[key]}; pass a data set with a "
                    "@classLabel and without timestamps"
                )
            data = key == "@data"
            continue
        if not line or line.startswith("#"):
            continue
        *channels, label = line.split(":")
        try:
            series.append(np.array([c.split(",") for c in channels], np.float32))
        except ValueError as error:
            raise UserError(f"{path}: series {len(series) + 1} can't be read ({error})") from error
        labels.append(label)
    if not series or not series[0].size:
        raise UserError(f"{path} has no labeled series; pass another data set")
    return series, labels


def aeon_series(name: str = "JapaneseVowels") -> tuple[Series, Series]:
    """Read a classification data set of the aeon package.

    Channels are normalized with the mean and the standard deviation of the training series.

    Args:
        name: a data set in the package, e.g. JapaneseVowels, BasicMotions, ArrowHead.

    Returns:
        (train, test).

    Raises:
        UserError: aeon is not installed, or does not include the data set.
    """
    hint = (
        "data.name needs the data files of the package aeon; pip install --no-deps aeon (only its "
        "data is read)"
    )
    root = package_folder("aeon", hint) / "datasets" / "data"
    files = [root / name / f"{name}_{split}.ts" for split in ("TRAIN", "TEST")]
    if not all(file.is_file() for file in files):
        known = sorted(
            {
                p.parent.name
                for p in root.glob("*/*_TRAIN.ts")
                if "@classlabel true" in p.read_text(encoding="utf-8", errors="replace").lower()
            }
        )
        raise UserError(
            f"data.data_args: aeon has no data set {name!r}; pass one of {', '.join(known)}"
        )
    loaded = [read_ts(file) for file in files]
    splits = [x for x, _ in loaded]
    classes = sorted({label for _, y in loaded for label in y})
    joined = np.concatenate(splits[0], axis=1)
    mean, std = joined.mean(1), joined.std(1).clip(1e-6)
    steps = max(s.shape[1] for x in splits for s in x)
    train, test = (
        Series(x, [classes.index(label) for label in y], classes, steps, mean, std)
        for x, (_, y) in zip(splits, loaded, strict=True)
    )
    return train, test
