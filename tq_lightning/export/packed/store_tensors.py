"""Collect the unquantized tensors of a prepared model for a packed file, and fold batch norms."""

import numpy as np
import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.sections import file_names
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import per_width_norms

_STORED_AS_IS = (torch.float32, torch.float64, torch.int64)  # other types are widened


def unquantized_tensors(model: nn.Module) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return unquantized tensors by file name, and the dtypes of all tensors the file widens."""
    usable = usable_norm_widths(model)
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


def usable_norm_widths(model: nn.Module) -> list[int]:
    """List the widths whose norm sets are trained or calibrated; empty without such norms."""
    norms = per_width_norms(model)
    if not norms:
        return []
    return [
        n
        for n in range(1, norms[0].width.max_bits + 1)
        if all(str(n) in norm.trained or bool(norm.calibrated[n]) for norm in norms)
    ]


def fold_batch_norms(model: nn.Module, tensors: dict[str, np.ndarray]) -> None:
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
