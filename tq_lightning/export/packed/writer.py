"""save_packed(): a prepared model -> a packed file of bit planes, scales and unquantized tensors.

docs/format.md is the specification, docs/read_packed.py a reader in plain NumPy.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

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
    keep_planes,
    merge_norms,
    section_sizes,
)
from tq_lightning.export.packed.skeleton import check_args, create_skeleton, prepare_skeleton
from tq_lightning.export.packed.store_tensors import (
    fold_batch_norms,
    unquantized_tensors,
    usable_norm_widths,
)
from tq_lightning.factories import is_factory
from tq_lightning.quant.bit_planes import aligned, pack_planes
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.quantized_tensors import weight_quantizers

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
        fold_batch_norms(model, tensors)
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
    tensors, dtypes = unquantized_tensors(model)
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
        "norm_widths": usable_norm_widths(model),
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
