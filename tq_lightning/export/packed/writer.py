"""save_packed(): a prepared model -> a packed file of bit planes, scales and unquantized tensors.

docs/format.md is the specification, docs/read_packed.py a reader in plain NumPy.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tq_lightning
from tq_lightning.errors import UserError
from tq_lightning.export.packed.container import write_container
from tq_lightning.export.packed.header import format_version
from tq_lightning.export.packed.model_checks import check_names
from tq_lightning.export.packed.optional_fields import (
    check_inputs,
    check_preprocessing,
    check_ranges,
)
from tq_lightning.export.packed.sections import (
    compress_planes,
    file_names,
    keep_planes,
    merge_norms,
    section_sizes,
)
from tq_lightning.export.packed.skeleton import check_args, create_skeleton, prepare_skeleton
from tq_lightning.factories import is_factory
from tq_lightning.quant.bit_planes import aligned, pack_planes
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import per_width_norms

_STORED_AS_IS = (torch.float32, torch.float64, torch.int64)  # other types are widened
_PREPROCESSING_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


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
    activation_ranges: Mapping[str, Sequence[float]] | None = None,
    inputs: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, int]:
    """Write a prepared model as integers. The file does not contain the float weights.

    Args:
        model: a prepared model in any mode, on any device. It is not changed.
        path: target file, written atomically.
        name: timm name of the model. None reads it from `model.pretrained_cfg`. Without a name,
            `load_packed` needs `model=`.
        model_args: further arguments that the model was created with, such as {"in_chans": 1}.
        max_bits: number of planes to store, 1..max_bits of `prepare`. None stores all.
        fold_norms: store batch norms as scale and shift, 2 vectors instead of 4. Logits then
            agree to a relative error of about 1e-5 instead of bit for bit.
        compress: compress each plane with zstd, without loss.
        preprocessing: some of input_size, mean, std, interpolation, crop_pct and crop_mode. None
            reads them from `model.pretrained_cfg`.
        class_names: one name per class.
        activation_ranges: {layer name: (low, high)}, range of the input of a quantized layer for
            integer inference. None takes the ranges that `calibrate_activations` stored on the
            model.
        inputs: inputs of a network that does not take images, {"name", "shape", "type"} each:
            parameter name, shape without the batch, and float32, int64 or bool. ONNX export
            needs them.

    Returns:
        Bytes per section of the file, with "header" and "total".

    Raises:
        UserError: the model is not prepared, contains NaN, or can't be rebuilt from the file.
    """
    header, tensors = _describe(model, name, model_args, preprocessing, class_names)
    if activation_ranges is None:
        activation_ranges = getattr(model, "tq_ranges", {})
    if activation_ranges:
        names = [layer["name"] for layer in header["layers"]]
        header["activation_ranges"] = check_ranges(activation_ranges, names)
    if inputs:
        header["inputs"] = check_inputs([dict(row) for row in inputs])
    stored = header["stored_bits"] if max_bits is None else max_bits
    if not isinstance(stored, int) or not 1 <= stored <= header["stored_bits"]:
        raise UserError(
            f"max_bits={max_bits!r} is not available; pass max_bits from 1 to "
            f"{header['stored_bits']}"
        )
    if fold_norms:
        header["folded"] = True
        _fold(model, tensors)
    header["norms"], tensors = merge_norms(tensors)
    if is_factory(header["model"]["name"]):
        _warn_of_arguments(header["model"], path)
    elif header["model"]["name"] is not None:
        skeleton = prepare_skeleton(create_skeleton(header["model"]), header["prepare"])
        check_names(header, set(tensors), skeleton)
    header, tensors = keep_planes(header, tensors, stored)
    if compress:
        header, tensors = compress_planes(header, tensors)
    version = format_version(header, tensors)
    return section_sizes(tensors, write_container(path, tensors, header, version))


def _warn_of_arguments(spec: Mapping[str, Any], path: str | Path) -> None:
    """Warn if `load_packed` will refuse to call the factory with the arguments of the file."""
    try:
        check_args(json.loads(json.dumps(spec["args"])), own=True)
    except UserError as error:
        warnings.warn(f"{path} can't be loaded by the name {spec['name']}: {error}", stacklevel=3)


def _describe(
    model: nn.Module,
    name: str | None,
    model_args: Mapping[str, Any] | None,
    preprocessing: Mapping[str, Any] | None,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and tensors of a prepared model, with all planes, not compressed."""
    if not weight_quantizers(model):
        raise UserError(
            f"{type(model).__name__} is not prepared and has nothing to pack; "
            "call prepare(model, ...) first"
        )
    timm_config = getattr(model, "pretrained_cfg", None) or {}
    if name is None and timm_config.get("architecture"):
        name = timm_config["architecture"]
    if preprocessing is None:
        known = {key: timm_config.get(key) for key in _PREPROCESSING_KEYS}
        preprocessing = {key: value for key, value in known.items() if value is not None} or None
    check_preprocessing(preprocessing)
    classes = getattr(model, "num_classes", None)
    args = dict(model_args or {})
    if name is not None and classes is not None:
        args.setdefault("num_classes", classes)
    if class_names is not None and classes is not None and len(class_names) != classes:
        raise UserError(
            f"{len(class_names)} class names for a model of {classes} classes; pass one per class"
        )
    tensors, dtypes = _unquantized(model)
    codes, layers, tensors["scale"] = _codes(model)
    stored = width_of(model).max_bits
    for p, plane in enumerate(pack_planes(codes, stored)):
        tensors[f"plane{p}"] = plane
    for bits, table in weight_quantizers(model)[0].quantizer.tables.items():
        if table is not None:
            tensors[f"levels{bits}"] = table.numpy()
    header = {
        "library": f"tq_lightning {tq_lightning.__version__}",
        "model": {"name": name, "args": args, "num_classes": classes},
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "class_names": None if class_names is None else list(class_names),
        "prepare": model.tq,
        "stored_bits": stored,
        "codes": codes.size,
        "layers": layers,
        "dtypes": dtypes,
        "norm_widths": _norm_widths(model),
        "norms": [],
        "folded": False,
        "compression": None,
    }
    return header, tensors


def _codes(model: nn.Module) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray]:
    """Quantize every weight to the stored width.

    Returns:
        The row of codes, uint8; the layer map; and all scales in its order, float32.
    """
    rows, scales, end = [], [], 0
    layers: list[dict[str, Any]] = []
    offsets: dict[int, int] = {}  # of parameters already written
    for weight in weight_quantizers(model):
        try:
            codes, scale = weight.quantizer.codes(weight.original.detach())
        except ValueError as error:  # NaN or infinity
            raise UserError(str(error)) from error
        if id(weight.original) not in offsets:  # tied weights share their codes
            row = codes.cpu().numpy().reshape(-1)
            rows.append(np.pad(row, (0, aligned(row.size) - row.size)))
            offsets[id(weight.original)] = end
            end += rows[-1].size
        layers.append(
            {
                "name": weight.name,
                "shape": list(codes.shape),
                "offset": offsets[id(weight.original)],
                "scale": list(scale.shape),
            }
        )
        scales.append(scale.detach().cpu().float().numpy().reshape(-1))
    return np.concatenate(rows), layers, np.concatenate(scales)


def _unquantized(model: nn.Module) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return unquantized tensors by file name, and the dtypes of all tensors the file widens."""
    usable = _norm_widths(model)
    tensors, dtypes = {}, {}
    for full, value, name in file_names(model):
        if name.startswith("norm") and int(name[4]) not in usable:
            continue
        if value.is_floating_point() and value.isnan().any():
            raise UserError(f"{full} contains NaN; repair the checkpoint, or pass an earlier one")
        tensors[name] = _array(value)
        if value.dtype not in _STORED_AS_IS:
            dtypes[full] = str(value.dtype).removeprefix("torch.")
    for weight in weight_quantizers(model):
        if weight.original.dtype != torch.float32:
            dtypes[weight.name] = str(weight.original.dtype).removeprefix("torch.")
    return tensors, dtypes


def _array(value: Tensor) -> np.ndarray:
    """Convert a value to float32, float64 or int64, whichever represents it exactly."""
    value = value.detach().cpu()
    if value.is_complex():
        raise UserError(
            f"a packed file can't store {value.dtype} tensors; keep them out of the model's buffers"
        )
    if value.dtype not in _STORED_AS_IS:
        value = value.float() if value.is_floating_point() else value.long()
    return value.numpy()


def _norm_widths(model: nn.Module) -> list[int]:
    """List the widths whose norm sets are trained or calibrated; empty without such norms."""
    norms = per_width_norms(model)
    if not norms:
        return []
    return [
        n
        for n in range(1, norms[0].width.max_bits + 1)
        if all(str(n) in norm.trained or bool(norm.calibrated[n]) for norm in norms)
    ]


def _fold(model: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Fold the statistics of affine batch norms into weight and bias, in place.

    With weight = gamma / sqrt(var + eps) and bias = beta - mean * weight, computed in float64 and
    rounded once to the type of gamma and beta, y = weight * x + bias. A reader sets the mean to 0
    and the variance to 1 - eps.
    """
    for full, _, name in file_names(model):
        stem, _, leaf = name.rpartition(".")
        if leaf != "running_var":
            continue
        if any(f"{stem}.{key}" not in tensors for key in ("running_mean", "weight", "bias")):
            continue  # not affine, or another norm, such as EvoNorm
        eps = float(model.get_submodule(full.rpartition(".")[0]).eps)  # type: ignore[arg-type]
        mean = tensors.pop(f"{stem}.running_mean").astype(np.float64)
        gamma, beta = tensors[f"{stem}.weight"], tensors[f"{stem}.bias"]
        weight = gamma / np.sqrt(tensors.pop(name).astype(np.float64) + eps)
        tensors[f"{stem}.bias"] = (beta - mean * weight).astype(beta.dtype)
        tensors[f"{stem}.weight"] = weight.astype(gamma.dtype)
