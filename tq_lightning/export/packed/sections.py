"""TODO export/packed/sections.py."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import CODING, compress_plane
from tq_lightning.export.packed.container import section_of
from tq_lightning.quant.codes import STORED_BITS


def sizes(tensors: Mapping[str, np.ndarray], total: int) -> dict[str, int]:
    """Bytes by section, with "header" (what is no tensor) and "total"."""
    out: dict[str, int] = {}
    for name, array in tensors.items():
        section = section_of(name)
        out[section] = out.get(section, 0) + array.nbytes
    return {"header": total - sum(out.values()), **dict(sorted(out.items())), "total": total}


def merge_norms(
    tensors: Mapping[str, np.ndarray],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The tensors of each width's norm set as one row, "norm4"; and how every row is cut: [{"name", "shape"}, ...].

    A set of ResNet-50 has 212 tensors: named one by one, at eight widths, their names would weigh more than a plane's tenth.
    """
    out = {name: array for name, array in tensors.items() if not name.startswith("norm")}
    cuts: list[dict[str, Any]] = []
    for section in sorted({section_of(name) for name in tensors if name not in out}):
        own = {
            name.split("/", 1)[1]: array
            for name, array in tensors.items()
            if name.startswith(f"{section}/")
        }
        cuts = [{"name": name, "shape": list(array.shape)} for name, array in own.items()]
        out[section] = np.concatenate([array.reshape(-1) for array in own.values()])
    return cuts, out


def sections_above(bits: int) -> set[str]:
    """The sections that a file of the first `bits` planes does without: the other planes and their norm sets."""
    return {f"plane{n}" for n in range(bits, STORED_BITS)} | {
        f"norm{n}" for n in range(bits + 1, STORED_BITS + 1)
    }


def narrowed(
    header: Mapping[str, Any], tensors: Mapping[str, np.ndarray], bits: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same file with its first `bits` planes, and the norm sets of those widths, alone."""
    gone = sections_above(bits)
    kept = {name: array for name, array in tensors.items() if section_of(name) not in gone}
    return {
        **header,
        "stored_bits": bits,
        "norm_widths": [n for n in header["norm_widths"] if n <= bits],
    }, kept


def compressed(
    header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same file with its planes as zstd frames."""
    first = tensors["plane0"]
    frames = {
        name: compress_plane(array, None if name == "plane0" else first)
        for name, array in tensors.items()
        if name.startswith("plane")
    }
    return {**header, "compression": CODING}, {**tensors, **frames}


def split_norms(
    header: Mapping[str, Any], floats: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Norm rows cut into their tensors: "norm4" -> "norm4/bn1.weight", ...; the rest as it is."""
    out = {}
    for name, array in floats.items():
        if not name.startswith("norm"):
            out[name] = array
            continue
        ends = np.cumsum([math.prod(cut["shape"]) for cut in header["norms"]])
        if array.ndim != 1 or array.dtype != np.float32 or ends[-1] != array.size:
            raise UserError(
                f"its norm set {name!r} is not of the size that its header says; export it again"
            )
        for cut, part in zip(header["norms"], np.split(array, ends[:-1]), strict=True):
            out[f"{name}/{cut['name']}"] = part.reshape(cut["shape"])
    return out
