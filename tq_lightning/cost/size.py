"""Bytes of a prepared model, to store and to read, for each storage scheme.

A storage scheme is a way to serve all widths. The model may be on the meta device (`meta_model`),
where it takes no memory. The predicted size of the packed file equals that of `export`, without the
header.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tq_lightning.cost.layer_bytes import FLOAT_BYTES, Row, layer_rows
from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.quant.prepare import prepare
from tq_lightning.records import ModelBytes, StorageBytes

PARTS = ("weights", "scales", "float", "norms")
PAPER_BITS = 8  # the paper keeps one norm set per width 1..8


def meta_model(name: str, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """Create a model on the meta device, or on the CPU if its constructor needs values.

    Raises:
        UserError: see `create_model`.
    """
    try:
        with torch.device("meta"):
            return create_model(name, num_classes, **kwargs)
    except UserError:
        return create_model(name, num_classes, **kwargs)


def _float_master(row: Row, bits: int) -> tuple[int, int, int, int]:
    return FLOAT_BYTES * row.codes, 0, row.floats, row.norm_set


def _file_per_width(row: Row, bits: int) -> tuple[int, int, int, int]:
    return (
        row.plane * bits * (bits + 1) // 2,
        row.scales * bits,
        row.floats * bits,
        row.norm_set * bits,
    )


def _master8(row: Row, bits: int) -> tuple[int, int, int, int]:
    return row.plane * bits, row.scales, row.floats, row.norm_set


def _packed(row: Row, bits: int) -> tuple[int, int, int, int]:
    # one table of 2^n levels for every width n
    levels = FLOAT_BYTES * (2 ** (bits + 1) - 2) if row.levels else 0
    return row.plane * bits, row.scales + levels, row.floats + row.tables, row.norm_set * row.sets


def _paper(row: Row, bits: int) -> tuple[int, int, int, int]:
    sets = PAPER_BITS if row.sets > 1 else row.sets
    return row.codes, 0, row.floats, row.norm_set * sets


# storage scheme -> bytes of a row in the order of PARTS, to serve the widths 1..max_bits
WAYS: dict[str, Callable[[Row, int], tuple[int, int, int, int]]] = {
    "float_master": _float_master,
    "file_per_width": _file_per_width,
    "master8": _master8,
    "packed": _packed,
    "paper": _paper,  # of the rows of `paper_rows`
}


def total(rows: Iterable[Row], way: str, max_bits: int) -> StorageBytes:
    """Return the bytes of a storage scheme, in total and by part."""
    columns = [
        sum(column) for column in zip(*(WAYS[way](row, max_bits) for row in rows), strict=True)
    ]
    columns = columns or [0] * len(PARTS)
    return StorageBytes(sum(columns), **dict(zip(PARTS, columns, strict=True)))


def read_at(rows: Iterable[Row], bits: int) -> int:
    """Return the bytes read to run at a width: planes, scales, float tensors, norm set, levels."""
    return sum(
        row.plane * bits
        + row.scales
        + row.floats
        + row.tables
        + row.norm_set
        + (FLOAT_BYTES * 2**bits if row.levels else 0)
        for row in rows
    )


def paper_rows(model: nn.Module) -> list[Row]:
    """Prepare a model in place with the policy of the paper's storage claim; return its rows.

    The accounting is `total(rows, "paper", 8)`: 8-bit weights of every layer except the stem, with
    the classifier; stem, biases and the rest in float; 8 batch norm sets; no scales, no header. The
    float parameters of ResNet-50 are 3.533 times larger.

    Source: TruncQuant, arXiv 2506.11431.
    """
    prepare(model, skip=("first",), norm="per_width", max_bits=PAPER_BITS, verbose=False)
    return layer_rows(model)


def float_over(rows: Iterable[Row], bytes_: float) -> float:
    """Return the bytes of the float parameters (one norm set, no statistics) over `bytes_`."""
    return FLOAT_BYTES * sum(row.parameters for row in rows) / bytes_


def record_bytes(model: nn.Module) -> ModelBytes:
    """Return the byte block of a run's record."""
    rows, max_bits = layer_rows(model), int(model.tq["max_bits"])  # type: ignore[index,arg-type]
    return ModelBytes(
        float=FLOAT_BYTES * sum(row.parameters for row in rows),
        packed=int(total(rows, "packed", max_bits).total),
        planes={bits: read_at(rows, bits) for bits in range(1, max_bits + 1)},
    )
