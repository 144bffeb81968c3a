"""Entries of the tensor index of a packed file: type, shape and byte range, checked."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# types of a packed file in the order of safetensors, with their NumPy names
DTYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "U8": "|u1"}
MAX_DIMS = 16  # dimensions of a tensor
MAX_EXTENT = 1 << 48  # of a dimension, an offset or a count


@dataclass(frozen=True)
class Entry:
    """Type, shape and byte range [begin, end) of one tensor, relative to the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def section_of(name: str) -> str:
    """Return the section of a tensor: "float" for "float/conv1.weight", "plane0" for "plane0"."""
    return name.split("/", 1)[0]


def is_shape(value: Any) -> bool:
    """Check that a JSON value is a list of at most `MAX_DIMS` dimensions."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMS
        and all(type(n) is int and 0 <= n < MAX_EXTENT for n in value)
    )


def parse_entry(name: str, value: dict[str, Any]) -> Entry:
    """Parse and check an entry of the index.

    Raises:
        ValueError: an invalid type, shape or byte range.
        KeyError: a missing field.
    """
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if set(value) != {"dtype", "shape", "data_offsets"} or dtype not in DTYPES:
        raise ValueError(f"tensor {name[:60]!r} has an invalid entry")
    if not is_shape(shape) or not is_shape([begin, end]):
        raise ValueError(f"tensor {name[:60]!r} has an invalid shape or offset")
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"tensor {name[:60]!r} has offsets that do not match its shape")
    return Entry(dtype, tuple(shape), begin, end)
