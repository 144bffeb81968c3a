"""The header of a packed file against the network it speaks of: names, shapes and places, before anything is unpacked."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import CODING
from tq_lightning.export.packed.container import Container, section_of
from tq_lightning.quant.bit_planes import aligned
from tq_lightning.quant.codes import STORED_BITS
from tq_lightning.quant.switchable_norm import FLOAT, PerWidthNorm
from tq_lightning.quant.weight import weight_quantizers

_LAYER_KEYS = {"name", "shape", "offset", "scale"}
_TYPES = {
    "int": "I64",
    "float64": "F64",
    "float": "F32",
    "scale": "F32",
    "norm": "F32",
    "plane": "U8",
}  # by section
_SETS = {str(bits) for bits in range(1, STORED_BITS + 1)}  # keys of norm sets
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "random")
_CROPS = ("center", "squash", "border")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def file_names(model: nn.Module) -> list[tuple[str, Tensor, str]]:
    """(name in the model, tensor, name in the file) for everything of a prepared model that a file holds as it is.

    Left out: quantized weights, the float set of per-width norms, and batch norm's counters, which move no output.
    """
    homes = {name for name, module in model.named_modules() if isinstance(module, PerWidthNorm)}
    behind = (
        set()
    )  # by name, not identity: an embedding tied to a quantized classifier is itself used in float
    for weight in weight_quantizers(model):
        owner = weight.name.removesuffix(weight.tensor)
        behind.add(f"{owner}parametrizations.{weight.tensor}.original")
    found = []
    for full, value in named_tensors(model):
        if full in behind or full.endswith("num_batches_tracked"):
            continue
        if (
            full.endswith(".calibrated") and full.removesuffix(".calibrated") in homes
        ):  # said by which norm sets are there
            continue
        kind = (
            "float64"
            if value.dtype == torch.float64
            else "float"
            if value.is_floating_point()
            else "int"
        )
        name = f"{kind}/{full}"
        home, _, inside = full.partition(".sets.")
        if home in homes:
            key, rest = inside.split(".", 1)
            if key == FLOAT:
                continue
            if kind == "float":
                name = f"norm{key}/{home}.{rest}"
        found.append((full, value, name))
    return found


def check_preprocessing(how: Mapping[str, Any] | None) -> None:
    """Raises UserError where images could not be made ready as `how` says; keys unknown here may hold anything."""
    how = how or {}
    size, numbers = how.get("input_size", [1, 1, 1]), [how.get("crop_pct", 1.0)]
    if (
        not isinstance(size, list | tuple)
        or len(size) != 3
        or any(type(n) is not int or not 0 < n <= 1 << 14 for n in size)
    ):
        raise UserError(
            f"preprocessing has input_size {str(size)[:40]}; it must be [channels, height, width]"
        )
    for key in ("mean", "std"):
        values = how.get(key, [])
        numbers += values if isinstance(values, list | tuple) else [None]
    if any(
        isinstance(n, bool) or not isinstance(n, int | float) or not abs(n) < 1e6 for n in numbers
    ):
        raise UserError(
            "preprocessing has a mean or std that is no list of numbers, or a crop_pct that is no number"
        )
    if (
        how.get("interpolation", "bicubic") not in _INTERPOLATIONS
        or how.get("crop_mode", "center") not in _CROPS
    ):
        raise UserError(
            f"preprocessing has an interpolation or crop_mode other than {', '.join(_INTERPOLATIONS + _CROPS)}"
        )


def read_header(file: Container, rest: bool = False) -> dict[str, Any]:
    """The header, of a whole file or of a rest file, with the type of every field checked."""
    header = file.header
    if rest and header.get("rest_of") is None:
        raise UserError(
            f"{file.path} is no rest file; write it with `export WHOLE --max-bits n --out NARROW --rest FILE`"
        )
    if not rest and header.get("rest_of") is not None:
        raise UserError(
            f"{file.path} is a rest file (missing planes only); join with `export NARROW --add REST --out FILE`"
        )
    kinds: dict[str, Any] = {
        "model": dict,
        "preprocessing": dict | None,
        "class_names": list | None,
        "prepare": dict,
        "stored_bits": int,
        "codes": int,
        "layers": list,
        "dtypes": dict,
        "norm_widths": list,
        "norms": list,
        "folded": bool,
        "compression": str | None,
    }
    for key, kind in kinds.items():
        if (
            key not in header
            or not isinstance(header[key], kind)
            or (kind is int and isinstance(header[key], bool))
        ):
            raise file.damaged(f"its header has no proper {key!r}")
    if header["compression"] not in (None, CODING):
        raise UserError(
            f"{file.path} is compressed as {header['compression'][:20]!r}, unknown here; update tq_lightning"
        )
    if not 1 <= header["stored_bits"] <= STORED_BITS:
        raise file.damaged(f"its number of planes is none of 1 to {STORED_BITS}")
    for keys, things in ((_LAYER_KEYS, header["layers"]), ({"name", "shape"}, header["norms"])):
        for thing in things:
            if (
                not isinstance(thing, dict)
                or set(thing) != keys
                or not isinstance(thing["name"], str)
            ):
                raise file.damaged("its layer map is not one")
            for shape in (thing["shape"], thing.get("scale", []), [thing.get("offset", 0)]):
                if not isinstance(shape, list) or any(
                    type(n) is not int or not 0 <= n < 1 << 48 for n in shape
                ):
                    raise file.damaged("its layer map has an absurd shape or place")
    if any(
        type(n) is not int or not 1 <= n <= header["stored_bits"] for n in header["norm_widths"]
    ):
        raise file.damaged("its norm sets are of widths that it does not store")
    if any(not isinstance(name, str) for name in header["class_names"] or []):
        raise file.damaged("its class names are none")
    for name, entry in file.entries.items():
        section = section_of(name)
        if entry.dtype != _TYPES.get(
            section if section in _TYPES else section.rstrip("0123456789")
        ):
            raise file.damaged(f"tensor {name[:60]!r} is of a type that it cannot have")
    try:
        check_preprocessing(header["preprocessing"])
    except UserError as error:
        raise file.damaged(str(error)) from error
    return header


def cast(header: Mapping[str, Any], full: str, value: Tensor, default: torch.dtype) -> Tensor:
    """`value` in the type that the header gives the tensor, or in `default`.

    Raises:
        UserError: a type that is none, or of another kind than the value's.
    """
    dtype = getattr(
        torch, str(header["dtypes"].get(full, str(default).removeprefix("torch."))), None
    )
    try:
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point == value.is_floating_point():
            return value.to(dtype)
    except (RuntimeError, TypeError):  # quantized and packed types take no conversion
        pass
    raise UserError(
        f"the file gives {full} a type that is none: {str(header['dtypes'].get(full))[:40]!r}"
    )


def _of_no_set(name: str, model: nn.Module) -> bool:
    """Whether a name of the file ("float64/bn1.sets.3.weight") is of a norm set that the network was built without."""
    home, _, inside = name.partition("/")[2].partition(".sets.")
    key = inside.partition(".")[0]
    norm = model
    for part in home.split(".") if key in _SETS else ():
        norm = norm._modules.get(part)  # type: ignore[assignment]
        if norm is None:
            return False
    return isinstance(norm, PerWidthNorm) and key not in norm.sets


def check_names(header: Mapping[str, Any], names: set[str], model: nn.Module) -> None:
    """Raises UserError where the tensors of the file are not those that its network wants."""
    folded = (".running_mean", ".running_var") if header["folded"] else ()
    own = {name for _, _, name in file_names(model) if not name.startswith("norm")} | {"scale"}
    own |= {f"norm{n}" for n in header["norm_widths"] if header["norms"]} | {
        f"plane{p}" for p in range(header["stored_bits"])
    }
    lacks = {n for n in own - names if not n.endswith(folded)} if folded else own - names
    adds = {name for name in names - own if not _of_no_set(name, model)}
    if header["norm_widths"]:
        # all sets are alike: those that the network was built with speak for the others
        cuts = {
            name.split("/", 1)[1]: value.shape
            for _, value, name in file_names(model)
            if name.startswith("norm")
        }
        given = {cut["name"]: torch.Size(cut["shape"]) for cut in header["norms"]}
        lacks |= {n for n in cuts if n not in given and not (folded and n.endswith(folded))}
        adds |= {n for n in given if given[n] != cuts.get(n)}
    if lacks or adds:
        words = [
            f"{what} {', '.join(sorted(s)[:2])}"
            for what, s in (("lacks", lacks), ("adds", adds))
            if s
        ]
        raise UserError(
            f"the file {' and '.join(words)} against the network {header['model'].get('name')!r} made with "
            f"{header['model'].get('args')}; pass model_args= to save_packed as the model was made, or model= to load_packed"
        )


def check_layers(
    header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module
) -> None:
    """The layer map against the network and against the rows of codes, before anything is unpacked."""
    own = {w.name: tuple(w.original.shape) for w in weight_quantizers(model)}
    given = {layer["name"]: tuple(layer["shape"]) for layer in header["layers"]}
    if given != own or len(given) != len(header["layers"]):
        raise UserError("its layer map is not that of its network")
    end, runs = (
        0,
        {layer["offset"]: aligned(math.prod(layer["shape"])) for layer in header["layers"]},
    )
    for offset, size in sorted(runs.items()):
        if offset != end:
            raise UserError("its layers overlap or leave a gap")
        end += size
    if any(
        aligned(math.prod(layer["shape"])) != runs[layer["offset"]] for layer in header["layers"]
    ):
        raise UserError("two layers of different size share their codes")
    if end != header["codes"]:
        raise UserError(f"its layers have {end} codes, its header speaks of {header['codes']}")
    for p in range(header["stored_bits"]):
        shape = shapes[f"plane{p}"]
        if len(shape) != 1 or (header["compression"] is None and shape[0] != end // 8):
            raise UserError(f"plane {p} is not of {end // 8} bytes")
    for layer in header["layers"]:
        pairs = list(zip(layer["scale"], layer["shape"], strict=False))
        if len(layer["scale"]) not in (0, len(layer["shape"])) or any(
            s not in (1, n) for s, n in pairs
        ):
            raise UserError(f"the scale of {layer['name']} does not fit its weight")
    if shapes["scale"] != (sum(math.prod(layer["scale"]) for layer in header["layers"]),):
        raise UserError("its scales are not as many as its header says")
