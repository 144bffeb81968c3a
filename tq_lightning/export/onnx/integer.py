"""Integer graph: a packed file at one width, its quantized layers computed in integers.

Static: activations are uint8 codes with calibrated or trained ranges, written as QuantizeLinear and
DequantizeLinear (see `qdq`). Dynamic: in networks whose quantized layers are all linear, such as
vision transformers, the ranges are computed at run time (see `dynamic_quantization`); for OpenVINO
only without calibrated ranges.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from tq_lightning.errors import UserError
from tq_lightning.export.onnx.activation_nodes import RUNTIMES, codes_of
from tq_lightning.export.onnx.code_activation import replace_activation_quantizers
from tq_lightning.export.onnx.dynamic_quantization import put_dynamic_layers
from tq_lightning.export.onnx.edit import GraphEditor
from tq_lightning.export.onnx.graph import float_graph, write_graph
from tq_lightning.export.onnx.integer_layers import take_layers
from tq_lightning.export.onnx.qdq import RESIDUALS, put_layers
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.weight import packed_weights
from tq_lightning.quant.activation_ranges import ActivationRange, activation_ranges
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.integer.arithmetic import signed_level
from tq_lightning.quant.integer.saturation import activation_top


class IntegerGraph(NamedTuple):
    """Layers and ranges of a graph, as returned by `export_integer`.

    Attributes:
        layers: names of the integer layers.
        in_float: {name: reason} of the quantized layers that stay in float.
        dynamic: True if activation ranges are computed at run time.
        top: largest activation code.
        safe: True if the sums are exact on every processor.
        exact: True if all weights are exact; otherwise the nearest int8 replaces 8-bit ones.
    """

    layers: tuple[str, ...]
    in_float: dict[str, str]
    dynamic: bool
    top: int
    safe: bool
    exact: bool

    def lines(self) -> list[str]:
        """Describe the graph: number of integer layers, layers in float, and saturation."""
        how = "computed at run time" if self.dynamic else "fixed"
        lines = [
            f"{len(self.layers)} quantized layers in integers, {len(self.in_float)} in float; "
            f"activation ranges are {how}, codes 0..{self.top}"
        ]
        lines += [f"  {name} stays in float: {reason}" for name, reason in self.in_float.items()]
        if not self.exact:
            lines.append(
                "  8-bit weights are the nearest int8; --exact computes the exact ones, in two "
                "products"
            )
        if not self.safe:
            lines.append(
                "  not exact on x86 processors without VNNI: sums with activation codes above 127 "
                "may saturate"
            )
        return lines


def export_integer(
    path: str | Path,
    out: str | Path,
    bits: int,
    runtime: str = "onnxruntime",
    residual: str | None = None,
    top: int | None = None,
    ranges: Mapping[str, ActivationRange] | None = None,
    exact: bool | None = None,
    model: nn.Module | str | None = None,
) -> IntegerGraph:
    """Write the integer graph of a packed file at one width.

    The input is "images" (batch, channels, height, width), the output "logits", both float32.

    Args:
        path: packed file.
        out: target file, written atomically.
        bits: width, 1 to the stored one.
        runtime: "onnxruntime" or "openvino". Quantizers are placed where this runtime fuses them.
        residual: "int8" also quantizes outputs of convolutions that no quantizer follows, such as
            the inputs of a residual add; "float" keeps them in float. None is "int8" for ONNX
            Runtime, and "float" for OpenVINO and for networks trained with activation codes.
        top: largest activation code, 255 or 127. None is 127 if products with 255 could exceed the
            16 bits of x86 processors without VNNI, else 255. Trained activations
            keep their codes.
        ranges: input ranges of layers, as `calibrate_activations` returns them. None takes those
            of the file.
        exact: use the exact 8-bit weights, as two products that cannot saturate on any processor.
            False uses the nearest int8 and one product. None is exact for networks trained with
            activation codes, so that they equal their simulation at 8 bits too.
        model: see `load_packed`.

    Returns:
        The integer layers, and those that stay in float.

    Raises:
        UserError: see `load_packed`; the file has no activation ranges, its levels are not evenly
            spaced, or no layer can be computed in integers; PyTorch can't export the network.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime {runtime!r}; pass one of {', '.join(RUNTIMES)}")
    if residual not in (None, *RESIDUALS):
        raise UserError(f"unknown residual {residual!r}; pass one of {', '.join(RESIDUALS)}")
    if top not in (None, 127, 255):
        raise UserError(f"unknown largest activation code {top!r}; pass 127 or 255")
    model = load_packed(path, bits=bits, model=model)
    weights = packed_weights(model)
    levels = sorted({weight.packed.level for weight in weights})
    try:
        for level in levels:
            signed_level(bits, level)
    except ValueError as error:
        raise UserError(f"{path} can't run on integers: {error}") from error
    known = dict(activation_ranges(model) if ranges is None else ranges)
    trained = replace_activation_quantizers(model, width_of(model), runtime)
    # OpenVINO computes MatMulInteger in float, slower than a float graph
    static = bool(trained) or (runtime == "openvino" and bool(known))
    dynamic = not static and all(isinstance(weight.module, nn.Linear) for weight in weights)
    if not any(isinstance(weight.module, nn.Linear | _ConvNd) for weight in weights):
        kinds = ", ".join(
            sorted({type_before_parametrizations(weight.module).__name__ for weight in weights})
        )
        raise UserError(
            f"no layer of {path} can be computed in integers (its quantized layers are {kinds}); "
            "omit --integer"
        )
    if not dynamic and not trained and not known:
        own = model.tq_file.get("inputs")  # type: ignore[operator,union-attr]
        data = "run, with the checkpoint of a run" if own else "with a folder of images"
        raise UserError(f"{path} has no activation ranges; pass --calibrate {data}")
    split = bits == 8 and (bool(trained) if exact is None else exact)
    safe_top = min(activation_top(bits, level, exact_sums=split) for level in levels)
    used_top = safe_top if top is None else top
    codes = {weight.name: weight.codes for weight in weights}
    editor = GraphEditor(float_graph(model))
    editor.drop_zero_biases()

    def refuse(name: str, x: str) -> str | None:
        if dynamic or name in known or codes_of(editor, x) is not None:
            return None
        return "its input has no activation range"

    layers, in_float = take_layers(editor, weights, codes, bits, refuse, split)
    if not layers:
        name, reason = next(iter(in_float.items()))
        raise UserError(
            f"no layer of {path} can be computed in integers ({name}: {reason}); omit --integer"
        )
    if dynamic:
        put_dynamic_layers(editor, layers, used_top)
    else:
        residual = residual or ("float" if trained or runtime == "openvino" else "int8")
        put_layers(editor, layers, known, used_top, runtime, residual)
    write_graph(editor.finish(), model, [bits], out)
    # trained 8-bit codes reach 255 even if `used_top` is 127
    highest = max(used_top, 255 if trained and bits == 8 else 0)
    return IntegerGraph(
        tuple(layer.name for layer in layers),
        in_float,
        dynamic,
        used_top,
        highest <= safe_top,
        all(layer.exact for layer in layers),
    )
