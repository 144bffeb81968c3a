"""Hugging Face data sets, local or from the hub, with timm's reader: `data.name: hfds/PATH`."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tq_lightning.data.images import UnreadableImage, escape_undecodable, read_image
from tq_lightning.data.splits import Source, Split, classes_of
from tq_lightning.errors import UserError, first_line

_SPLITS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}


def read_hfds(source: Source, split: str) -> Split | None:
    """Read a map-style data set with the columns `image` and `label`.

    Labels are read without decoding images. `data.root`, if it is not the default, is the cache
    folder of the `datasets` package.

    Raises:
        UserError: the package is not installed, the data set can't be opened, or it lacks one of
            the columns.
    """
    if find_spec("datasets") is None:
        raise UserError(
            "data.name=hfds/... needs the package datasets; pip install 'tq_lightning[hfds]'"
        )
    from timm.data.readers.reader_hfds import ReaderHfds

    if source.index is None and split != "train":
        read_hfds(source, "train")  # the training split defines the classes
    root = None if str(source.root) == "data" else str(source.root)
    for name in _SPLITS[split]:
        try:
            reader = ReaderHfds(source.path, root, name)
        except ValueError as error:
            # the data set has no split of this name
            if str(error).startswith(("Unknown split", "Bad split")):
                continue
            raise _cannot_open(source.path, error) from error
        except Exception as error:  # raised by the network, the hub, pyarrow or the file system
            raise _cannot_open(source.path, error) from error
        return _split(source, split, reader)
    return None


def _cannot_open(path: str, error: Exception) -> UserError:
    return UserError(
        f"data.name=hfds/{path} can't be opened ({type(error).__name__}: "
        f"{first_line(error)[:200]}); pass a data set of the hub or a folder, with the columns "
        "image and label"
    )


def _split(source: Source, split: str, reader: Any) -> Split:
    path = source.path
    labels = _labels(path, reader)
    known = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    if known and source.index is None:
        source.index = dict(reader.class_to_idx)
    classes = classes_of(source, labels, known, f"the {split} split of hfds/{path} has")

    def read(number: int) -> tuple[Any, int]:
        try:
            file, label = reader[number]
            with file:
                return read_image(file), int(label)
        except (UnreadableImage, OSError, AssertionError) as error:
            where = f"image {number} of hfds/{path}"
            raise UnreadableImage(escape_undecodable(f"{where} {error}")) from error
        except TypeError as error:  # timm on a row without an image
            raise UnreadableImage(f"image {number} of hfds/{path} is missing") from error

    return Split(classes, labels, read=read)


def _labels(path: str, reader: Any) -> torch.Tensor:
    """Read the labels, without decoding images; see `read_hfds` for the errors."""
    dataset = reader.dataset
    columns = [
        name for name in dataset.column_names if dataset.data.column(name).null_count < len(dataset)
    ]  # timm adds a missing column of images, without values
    absent = [key for key in (reader.image_key, reader.label_key) if key not in columns]
    if len(dataset) and absent:
        raise UserError(
            f"data.name=hfds/{path}: no column {absent[0]} among {', '.join(columns)}; pass a data "
            "set with the columns image and label"
        )
    try:
        values = dataset.remove_columns(reader.image_key).with_format("numpy")[reader.label_key]
        labels = np.asarray(values)
    except ValueError:  # lists of different lengths
        labels = np.empty(len(dataset), object)
    if not labels.size or labels.ndim > 1 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"data.name=hfds/{path}: the column label has {len(labels)} rows of type "
            f"{labels.dtype}{' lists' * (labels.ndim > 1)}; pass a data set with non-negative "
            "integer labels (-1 marks a missing label)"
        )
    return torch.from_numpy(labels.astype(np.int64))
