"""Load the unquantized tensors of a packed file into a network on the meta device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.sections import file_names, named_tensors
from tq_lightning.quant.switchable_norm import per_width_norms


def fill_unquantized(
    model: nn.Module, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], widths: list[int]
) -> None:
    """Set every unquantized tensor from the file, and delete the norm sets of other widths.

    Args:
        model: prepared network. Its unquantized tensors may be on the meta device.
        header: header of the file.
        arrays: arrays by file name, with the norm sets split by `sections.split_norms`.
        widths: widths that the model will run at.

    Raises:
        UserError: a tensor has another shape in the file than in the network, or an invalid dtype.
    """
    for full, value, name in file_names(model):
        module, leaf = _owner(model, full)
        if name.startswith("norm") and int(name[4]) not in widths:
            continue
        if name in arrays:
            array = arrays[name]
            if array.shape != tuple(value.shape):
                raise UserError(
                    f"{full} has shape {tuple(array.shape)} in the file, "
                    f"{tuple(value.shape)} in the network"
                )
            filled = torch.tensor(array)
        else:  # statistics of a folded batch norm
            constant = 0.0 if leaf == "running_mean" else 1.0 - float(module.eps)  # type: ignore[arg-type]
            filled = torch.full(value.shape, constant)
        _set_tensor(module, leaf, cast_to_header_dtype(header, full, filled, value.dtype))
    for full, value in list(named_tensors(model)):
        if full.endswith("num_batches_tracked"):
            module, leaf = _owner(model, full)
            _set_tensor(module, leaf, torch.zeros(value.shape, dtype=torch.long))
    for norm in per_width_norms(model):
        for key in set(norm.sets) - {str(n) for n in widths}:
            del norm.sets[key]
        norm.calibrated = torch.tensor([n in widths for n in range(norm.width.max_bits + 1)])


def _owner(model: nn.Module, full: str) -> tuple[nn.Module, str]:
    parent, _, leaf = full.rpartition(".")
    return model.get_submodule(parent), leaf


def _set_tensor(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def cast_to_header_dtype(
    header: Mapping[str, Any], full: str, value: Tensor, default: torch.dtype
) -> Tensor:
    """Cast `value` to the dtype that the header lists for the tensor `full`, or to `default`.

    Raises:
        UserError: an unknown dtype, or a float dtype for an integer tensor or vice versa.
    """
    name = header["dtypes"].get(full, str(default).removeprefix("torch."))
    dtype = getattr(torch, str(name), None)
    try:
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point == value.is_floating_point():
            return value.to(dtype)
    except (RuntimeError, TypeError):  # tensors can't be converted to quantized and packed types
        pass
    raise UserError(f"the file has an invalid dtype {str(name)[:40]!r} for {full}")
