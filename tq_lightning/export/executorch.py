"""ExecuTorch program: a packed file at one width, with its codes as int8 and int4 weights.

Quantized convolutions and linear layers run on XNNPACK's integer kernels. Their weights are the
codes of the file, not quantized again. The convolutions of a file with activation ranges use these
ranges (static quantization, see `executorch_static`). Other layers quantize their inputs at run
time, each with its own range (dynamic quantization). All other operations run in float.

XNNPACK stores the weights of linear layers as int4 at 4 bits and below, and those of convolutions
as int8 at every width. All integers are exact. If the odd integers of the levels `endpoint` and
`centre` do not fit the type (8 bits in int8, 4 bits in int4), the codes k' are stored instead, and
an additional output channel sums the inputs (see `integer_weight`).
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.export.executorch_layers import DynamicLayer, linear_or_conv_weight
from tq_lightning.export.executorch_lowering import Backend, LoweringError, lower, xnnpack_backend
from tq_lightning.export.executorch_static import static_network
from tq_lightning.export.packed.optional_fields import input_size
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.weight import packed_weights, replace_parametrized
from tq_lightning.files import atomic_write
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.activation_ranges import activation_ranges
from tq_lightning.quant.bit_width import width_of


class Program(NamedTuple):
    """Layers of a program, as returned by `export_executorch`.

    Attributes:
        integer: names of the weights that run as integers.
        left_in_float: {name: reason} of the quantized weights that stay in float.
        fixed: subset of `integer` whose inputs have fixed ranges.
        no_fixed_ranges: reason why the ranges of the file are not used, if they could not be.
    """

    integer: list[str]
    left_in_float: dict[str, str]
    fixed: list[str]
    no_fixed_ranges: str | None = None

    def lines(self) -> list[str]:
        """Describe the program: integer layers, their storage, and each layer in float."""
        lines = [
            f"{len(self.integer)} layers run as integers, {len(self.left_in_float)} quantized "
            f"layers in float; {len(self.fixed)} have fixed activation ranges, the others "
            "compute theirs at run time",
            "XNNPACK stores convolutions as int8 at every width, and linear layers as int4 at "
            "4 bits and below",
        ]
        if self.no_fixed_ranges is not None:
            lines.append(f"the ranges of the file are not used: {self.no_fixed_ranges}")
        return lines + [f"left in float: {n}: {why}" for n, why in self.left_in_float.items()]


def export_executorch(
    path: str | Path,
    out: str | Path,
    bits: int,
    model: nn.Module | str | None = None,
    static: bool | None = None,
) -> Program:
    """Write the program of a packed file at one width, for images in batches of 1.

    Args:
        path: packed file.
        out: target file (.pte), written atomically.
        bits: width, one of those that the file supports.
        model: see `load_packed`.
        static: use the activation ranges of the file for convolutions. None uses them if the file
            has them and ExecuTorch can lower and load the result.

    Returns:
        The layers that run as integers, and those that stay in float.

    Raises:
        UserError: see `load_packed`; ExecuTorch is not installed or was built for another PyTorch;
            the network quantizes its activations; PyTorch or ExecuTorch can't express the network,
            or ExecuTorch's runtime can't load the program.
    """
    backend = xnnpack_backend()
    model = load_packed(path, bits=bits, model=model)
    if model.tq_file.get("inputs"):  # type: ignore[operator,union-attr]
        raise UserError("ExecuTorch export is for networks of images; pass --format onnx")
    header: Any = model.tq_file
    size = input_size(header)
    if any(isinstance(module, ActivationQuantizer) for module in model.modules()):
        raise UserError(
            f"{path} was trained with quantized activations, which --format executorch would "
            "replace with its own; pass --format onnx instead"
        )
    if static is None and _has_convolution_ranges(model):
        # ExecuTorch may not lower the fixed ranges of every network
        try:
            buffer, program = _make_program(copy.deepcopy(model), path, size, backend, True)
        except LoweringError as error:
            buffer, program = _make_program(model, path, size, backend, False)
            program = program._replace(no_fixed_ranges=str(error))
    else:
        buffer, program = _make_program(model, path, size, backend, bool(static))
    with atomic_write(out) as temporary:
        temporary.write_bytes(buffer)
    return program


def _make_program(
    model: nn.Module, path: str | Path, size: tuple[int, ...], backend: Backend, static: bool
) -> tuple[bytes, Program]:
    """Return the bytes of the program, and its layers."""
    network, program = _integer_network(model, static)
    if not program.integer:
        name, reason = next(iter(program.left_in_float.items()))
        raise UserError(
            f"no layer of {path} can run on integers ({name}: {reason}); pass --format onnx instead"
        )
    return lower(network, size, backend), program


def _has_convolution_ranges(model: nn.Module) -> bool:
    convolutions = any(isinstance(w.module, nn.Conv2d) for w in packed_weights(model))
    return convolutions and bool(activation_ranges(model))


def _integer_network(model: nn.Module, static: bool) -> tuple[nn.Module, Program]:
    """Return a network with integer layers, and their names."""
    made = static_network(model) if static else None
    if made is None:
        return model, _to_integers(model)
    return made.network, Program(made.integer, made.left_in_float, made.fixed)


def _to_integers(model: nn.Module) -> Program:
    """Replace quantized layers by integer layers in place; other weights become float."""
    bits = width_of(model).bits
    assert bits is not None
    program = Program([], {}, [])
    for name, module, tensor, packed in packed_weights(model):
        codes = module.parametrizations[tensor].original  # type: ignore[index,union-attr]
        weight = getattr(module, tensor).detach().clone()
        replace_parametrized(module, tensor, nn.Parameter(weight, requires_grad=False))
        reason = _why_float(module, tensor)
        if packed.table(bits) is not None:
            reason = f"level {packed.level!r} is a table and has no integer form"
        if reason is not None:
            program.left_in_float[name] = reason
            continue
        integers = linear_or_conv_weight(codes, bits, packed.scale, packed.level)
        layer = DynamicLayer(module, integers)
        for parent in list(model.modules()):  # the layer may have several names
            for child, value in parent._modules.items():
                if value is module:
                    parent._modules[child] = layer
        program.integer.append(name)
    return program


def _why_float(module: nn.Module, tensor: str) -> str | None:
    """Return the reason why XNNPACK has no integer kernel for a layer, or None if it has one."""
    kind = type(module)
    if tensor != "weight" or kind not in (nn.Conv2d, nn.Linear):
        return f"{kind.__name__}.{tensor} is not the weight of a plain Conv2d or Linear"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "XNNPACK has no dynamically quantized grouped or depthwise convolution"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"padding {module.padding!r} of mode {module.padding_mode!r}"
    return None
