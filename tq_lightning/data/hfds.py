"""Hugging Face data sets, local or from the hub, with timm's reader: `data.name: hfds/PATH`."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tq_lightning.data.images import UnreadableImage, escape_undecodable, read_image
from tq_lightning.data.splits import Source, Split
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

    root = None if str(source.root) == "data" else str(source.root)
    for name in _SPLITS[split]:
        try:
            reader = ReaderHfds(source.path, root, name)
        except ValueError as error:
            if "split" in str(error).lower():  # the data set has no split of this name
                continue
            raise _cannot_open(source.path, error) from error
        except Exception as error:  # raised by the network, the hub, pyarrow or the file system
            raise _cannot_open(source.path, error) from error
        return _split(source.path, reader)
    return None


def _cannot_open(path: str, error: Exception) -> UserError:
    return UserError(
        f"data.name=hfds/{path} can't be opened ({type(error).__name__}: "
        f"{first_line(error)[:200]}); pass a data set of the hub or a folder, with the columns "
        "image and label"
    )


def _split(path: str, reader: Any) -> Split:
    columns = reader.dataset.remove_columns(reader.image_key).with_format("numpy")
    labels = np.asarray(columns[reader.label_key])
    if not labels.size or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"data.name=hfds/{path}: the column label has {labels.size} rows of type "
            f"{labels.dtype}; pass a data set with non-negative "
            "integer labels (-1 marks a missing label)"
        )
    names = reader.class_to_idx or {str(n): n for n in range(int(labels.max()) + 1)}

    def read(number: int) -> tuple[Any, int]:
        try:
            file, label = reader[number]
            with file:
                return read_image(file), int(label)
        except (UnreadableImage, OSError, AssertionError) as error:
            where = f"image {number} of hfds/{path}"
            raise UnreadableImage(escape_undecodable(f"{where} {error}")) from error

    classes = sorted(names, key=names.__getitem__)
    return Split(classes, torch.from_numpy(labels.astype(np.int64)), read=read)
