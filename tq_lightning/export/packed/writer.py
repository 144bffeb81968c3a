"""The packed file of a prepared model: what goes in, and what of it is read for a width.

Sections, in file order: "int", "float64", "float" (everything not quantized), "norm1".."norm8" (one set of norms per
width), "scale", "plane0".."plane7" (most significant first, all layers in one row of codes). n bits need the first, the
set of width n, and the first n planes. docs/format.md is the specification, docs/read_packed.py a reader in plain NumPy.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tq_lightning
from tq_lightning.errors import UserError
from tq_lightning.export.packed.container import write_container
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.schema import check_names, check_preprocessing, file_names
from tq_lightning.export.packed.sections import compressed, merge_norms, narrowed, sizes
from tq_lightning.export.packed.skeleton import build_skeleton
from tq_lightning.quant.bit_planes import aligned, pack_planes
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.quant.weight import weight_quantizers

__all__ = ["load_packed", "save_packed"]

_WIDE = (torch.float32, torch.float64, torch.int64)  # types a file holds as they are
_CFG_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def save_packed(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    max_bits: int | None = None,
    fold_norms: bool = False,
    compress: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, int]:
    """Writes a prepared model as integers: bit planes, scales, and what is not quantized. No float parent goes in.

    Args:
        model: a prepared model; its mode and device do not matter, it is not changed.
        path: file to write, whole or not at all.
        name: timm name of the model; None = what timm noted on it. Without a name, `load_packed` needs `model=`.
        model_args: further arguments of `create_model` that it was made with, such as {"in_chans": 1}.
        max_bits: store the first planes alone, 1..max_bits of `prepare`; None = all.
        fold_norms: store batch norms as scale and shift, 2 vectors instead of 4; logits then agree to about 1e-5 of
            their size, no longer bit for bit.
        compress: zstd, one frame a plane; lossless.
        preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode; None = timm's for this model.
        class_names: one for each class.

    Returns:
        {section of the file: bytes}, with "header" and "total".

    Raises:
        UserError: not a prepared model, or one that could not be rebuilt from the file.
    """
    header, tensors = describe(model, name, model_args, preprocessing, class_names)
    stored = header["stored_bits"] if max_bits is None else max_bits
    if not isinstance(stored, int) or not 1 <= stored <= header["stored_bits"]:
        raise UserError(
            f"no such number of planes {max_bits!r}; pass max_bits from 1 to {header['stored_bits']}"
        )
    if fold_norms:
        header["folded"] = True
        fold(model, tensors)
    header["norms"], tensors = merge_norms(tensors)
    if header["model"]["name"] is not None:
        check_names(header, set(tensors), build_skeleton(header))
    header, tensors = narrowed(header, tensors, stored)
    if compress:
        header, tensors = compressed(header, tensors)
    return sizes(tensors, write_container(path, tensors, header))


def describe(
    model: nn.Module,
    name: str | None,
    model_args: Mapping[str, Any] | None,
    preprocessing: Mapping[str, Any] | None,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A prepared model as a file's header and tensors, all planes, nothing folded or compressed."""
    quantized = weight_quantizers(model)
    if not quantized:
        raise UserError(
            f"{type(model).__name__} is not prepared, there is nothing to pack; call prepare(model, ...) first"
        )
    config = getattr(model, "pretrained_cfg", None) or {}
    if name is None and config.get("architecture"):
        name = config["architecture"]
    check_preprocessing(preprocessing)
    classes = getattr(model, "num_classes", None)
    args = dict(model_args or {})
    if name is not None and classes is not None:
        args.setdefault("num_classes", classes)
    if class_names is not None and classes is not None and len(class_names) != classes:
        raise UserError(
            f"{len(class_names)} class names for a model of {classes} classes; pass one for each"
        )

    tensors, dtypes = _floats(model)
    layers: list[dict[str, Any]] = []
    placed: dict[int, dict[str, Any]] = {}
    rows, scales, at = [], [], 0
    for item in quantized:
        weight = item.original
        codes, scale = item.quantizer.codes(weight.detach())
        factor = scale.detach().cpu().float().numpy()
        scales.append(factor.reshape(-1))
        layer = {
            "name": item.name,
            "shape": list(codes.shape),
            "offset": at,
            "scale": list(factor.shape),
        }
        if weight.dtype != torch.float32:
            dtypes[item.name] = str(weight.dtype).removeprefix("torch.")
        if id(weight) in placed:  # tied: one run of codes serves both
            layer["offset"] = placed[id(weight)]["offset"]
        else:
            row = codes.cpu().numpy().reshape(-1)
            rows.append(np.pad(row, (0, aligned(row.size) - row.size)))
            placed[id(weight)] = layer
            at += rows[-1].size
        layers.append(layer)
    tensors["scale"] = np.concatenate(scales)
    stored = width_of(model).max_bits
    for p, plane in enumerate(pack_planes(np.concatenate(rows), stored)):
        tensors[f"plane{p}"] = plane
    header = {
        "library": f"tq_lightning {tq_lightning.__version__}",
        "model": {"name": name, "args": args, "num_classes": classes},
        "preprocessing": _preprocessing(config) if preprocessing is None else dict(preprocessing),
        "class_names": None if class_names is None else list(class_names),
        "prepare": model.tq,
        "stored_bits": stored,
        "codes": at,
        "layers": layers,
        "dtypes": dtypes,
        "norm_widths": norm_widths(model),
        "norms": [],
        "folded": False,
        "compression": None,
    }
    return header, tensors


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any] | None:
    return {key: config[key] for key in _CFG_KEYS if config.get(key) is not None} or None


def _floats(model: nn.Module) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Everything but the quantized weights by file name, and the types of what the file widens.

    Buffers that a state dict leaves out are in it too: a reader then needs no second source for any number.
    """
    usable = norm_widths(model)
    tensors, dtypes = {}, {}
    for full, value, name in file_names(model):
        if name.startswith("norm") and int(name[4]) not in usable:
            continue
        tensors[name] = _array(value)
        if value.dtype not in _WIDE:
            dtypes[full] = str(value.dtype).removeprefix("torch.")
    return tensors, dtypes


def _array(value: Tensor) -> np.ndarray:
    """The value as float32, float64 or int64, whichever holds it exactly."""
    value = value.detach().cpu()
    if value.is_complex():
        raise UserError(
            f"a packed file has no place for a tensor of {value.dtype}; keep it out of the model's buffers"
        )
    if value.dtype not in _WIDE:
        value = value.float() if value.is_floating_point() else value.long()
    return value.numpy()


def norm_widths(model: nn.Module) -> list[int]:
    """Widths whose norm sets hold statistics, trained or calibrated; empty for a model without norms per width."""
    norms = per_width_norms(model)
    if not norms:
        return []
    top = norms[0].width.max_bits
    return [
        n
        for n in range(1, top + 1)
        if all(str(n) in m.trained or bool(m.calibrated[n]) for m in norms)
    ]


def fold(model: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Replaces the four vectors of every affine batch norm in `tensors` by two, in place: y = weight x + bias.

    weight = gamma / sqrt(var + eps), bias = beta - mean weight, in float64 before the one rounding. A reader gives the
    layer a mean of 0 and a variance of 1 - eps.
    """
    for full, _, name in file_names(model):
        stem, _, leaf = name.rpartition(".")
        if leaf != "running_var" or f"{stem}.weight" not in tensors:
            continue
        eps = float(model.get_submodule(full.rpartition(".")[0]).eps)  # type: ignore[arg-type]
        mean = tensors.pop(f"{stem}.running_mean").astype(np.float64)
        factor = tensors[f"{stem}.weight"] / np.sqrt(tensors.pop(name).astype(np.float64) + eps)
        tensors[f"{stem}.bias"] = (tensors[f"{stem}.bias"] - mean * factor).astype(np.float32)
        tensors[f"{stem}.weight"] = factor.astype(np.float32)
