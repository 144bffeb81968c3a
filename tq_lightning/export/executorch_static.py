"""Static quantization: the convolutions of a program with the activation ranges of the file.

The network is traced as in PyTorch's integer mode, so both have quantizers at the same places. An
integer convolution of XNNPACK needs quantized inputs and outputs. If its output is not quantized,
e.g. before a residual add, the range follows from beta and gamma of the batch norm; without a norm,
the range of the input is computed at run time. Linear layers always compute it at run time, because
XNNPACK can then store them as int4.

8-bit `endpoint` and `centre` weights are rounded to the nearest int8, because an additional output
channel with the sum of the inputs would be rounded to 8 bits as well.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tq_lightning.export.executorch_layers import (
    DynamicLayer,
    FixedCodes,
    QuantizedChain,
    StaticConv,
    linear_or_conv_weight,
)
from tq_lightning.quant.activation_ranges import ActivationRange
from tq_lightning.quant.codes import truncate_codes
from tq_lightning.quant.integer.activations import CodeParams, Dequantize, Quantize
from tq_lightning.quant.integer.arithmetic import integer_weight
from tq_lightning.quant.integer.float_conv import FloatConv
from tq_lightning.quant.integer.kernels import NO_ACT, RELU
from tq_lightning.quant.integer.layer import IntegerLayer
from tq_lightning.quant.integer.norms import act_of, folded_norm, norm_spread
from tq_lightning.quant.integer.plan import NOT_QUANTIZED, IntegerPlan
from tq_lightning.quant.integer.rewrite import CodePool, OwnedCopy, rewrite
from tq_lightning.quant.integer.stored_weight import stored_weight
from tq_lightning.quant.switchable_norm import PerWidthNorm


class StaticNetwork(NamedTuple):
    """A network for XNNPACK, as returned by `static_network`.

    Attributes:
        network: the network.
        integer: names of the weights that run as integers.
        left_in_float: {name: reason} of the quantized weights that stay in float.
        fixed: subset of `integer` whose inputs have fixed ranges.
    """

    network: nn.Module
    integer: list[str]
    left_in_float: dict[str, str]
    fixed: list[str]


def static_network(model: nn.Module) -> StaticNetwork | None:
    """Convert a packed model with activation ranges to a network for XNNPACK, at its width.

    Args:
        model: packed model in evaluation mode. Its modules are reused.

    Returns:
        The network; None if torch.fx cannot trace the model.
    """
    plan = IntegerPlan(model.eval(), exact_sums=True, exact=False)
    with torch.no_grad():
        graph = rewrite(plan)
        if graph is None:
            return None
        in_float = {k: v for k, v in plan.layers.items() if v not in ("integer", NOT_QUANTIZED)}
        fixed = _replace(graph, in_float)
        for module in graph.modules():
            for tensor in list(getattr(module, "parametrizations", ())):
                parametrize.remove_parametrizations(module, tensor)
    integer = [k for k, v in plan.layers.items() if v == "integer" and k not in in_float]
    names = [[f"{name}.weight" for name in group] for group in (integer, fixed)]
    left = {f"{name}.weight": reason for name, reason in in_float.items()}
    return StaticNetwork(graph, names[0], left, names[1])


def _replace(graph: fx.GraphModule, in_float: dict[str, str]) -> list[str]:
    """Replace the modules of integer mode in place. Return the layers with fixed ranges.

    Layers in float are added to `in_float`. Tensors are dequantized codes instead of codes.
    """
    fixed = []
    codes: dict[fx.Node, CodeParams] = {}  # of the tensors that are codes in integer mode
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        made: nn.Module | None = None
        if isinstance(module, IntegerLayer):
            made = _layer(module, len(node.args) > 1)
            if isinstance(made.layer, StaticConv):
                fixed.append(module.name)
            elif not isinstance(made.layer, DynamicLayer):
                in_float[module.name] = (
                    "XNNPACK needs the output range of a grouped convolution, which has no batch "
                    "norm to estimate it from"
                )
            if module.out is not None:
                codes[node] = module.out.at(module.width)
        elif isinstance(module, Quantize):
            codes[node] = module.codes.at(module.width)
            made = FixedCodes(codes[node])
        elif isinstance(module, (Dequantize, OwnedCopy)):
            made = nn.Identity()
        elif isinstance(module, FloatConv):
            made = _float_conv(module)
        elif node.op != "output" and (moved := _codes_of_argument(node, codes)) is not None:
            codes[node] = moved
            if isinstance(module, CodePool):
                made = nn.Sequential(module.pool, FixedCodes(codes[node]))
            else:
                _insert_codes(graph, node, codes)
        if made is not None:
            graph.set_submodule(str(node.target), made)
    graph.recompile()
    return fixed


def _codes_of_argument(node: fx.Node, codes: dict[fx.Node, CodeParams]) -> CodeParams | None:
    first = node.args[0] if node.args else None
    return codes.get(first) if isinstance(first, fx.Node) else None


def _insert_codes(graph: fx.GraphModule, node: fx.Node, codes: dict[fx.Node, CodeParams]) -> None:
    """Quantize the output of an operation that moves codes."""
    name = f"{node.name}_codes"
    graph.add_module(name, FixedCodes(codes[node]))
    with graph.graph.inserting_after(node):
        after = graph.graph.call_module(name, (node,))
    node.replace_all_uses_with(after, lambda user: user is not after)
    codes[after] = codes[node]


def _layer(layer: IntegerLayer, has_shortcut: bool) -> QuantizedChain:
    """Convert a layer of integer mode to a layer of the program."""
    width, inner = layer.width, layer.layer
    assert width.bits is not None
    weight = stored_weight(inner)
    narrow = truncate_codes(weight.codes, weight.stored, width.bits)
    factor, bias = folded_norm(layer.norm, len(narrow))
    if inner.bias is not None:
        bias = bias + inner.bias.detach().double() * factor  # type: ignore[operator,union-attr]
    scale = weight.scale.double() * factor.view(-1, *[1] * (narrow.dim() - 1))
    out = None if layer.out is None else layer.out.at(width)
    fused = layer.act in (NO_ACT, RELU) or layer.act.name == "hardtanh"
    fused = fused and out is not None and not has_shortcut
    between = None if fused else _codes_of_norm(layer.norm)
    if not isinstance(inner, nn.Conv2d) or not (fused or between or inner.groups > 1):
        integers = linear_or_conv_weight(narrow, width.bits, scale, weight.level)
        return QuantizedChain(DynamicLayer(_with_bias(inner, bias), integers), None, layer.act, out)
    if not fused and between is None:
        conv = _conv(inner, inner.weight.detach().double() * factor.view(-1, 1, 1, 1), bias)
        return QuantizedChain(conv, None, layer.act, out)
    integers = integer_weight(narrow, width.bits, scale, weight.level)
    static = StaticConv(inner, integers, bias, layer.into.at(width).step)
    return QuantizedChain(static, between, layer.act, out)


def _codes_of_norm(norm: nn.Module | None) -> CodeParams | None:
    """Return codes for the output of a batch norm, by beta and gamma; None without them."""
    if isinstance(norm, PerWidthNorm):
        norm = norm.sets[str(norm.width.bits)]
    if norm is None or getattr(norm, "weight", None) is None:
        return None
    low, high = norm_spread(norm.bias.detach(), norm.weight.detach())  # type: ignore[operator,union-attr]
    return CodeParams.of_range(ActivationRange(low, high), 255)


def _with_bias(layer: nn.Module, bias: Tensor) -> nn.Module:
    layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer


def _conv(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Create a float convolution with the options of another one."""
    options: Any = (like.stride, like.padding, like.dilation, like.groups, True, like.padding_mode)
    made = nn.Conv2d(like.in_channels, like.out_channels, like.kernel_size, *options)  # type: ignore[arg-type]
    made.weight = nn.Parameter(weight.float(), requires_grad=False)
    made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made


def _float_conv(module: FloatConv) -> nn.Module:
    """Return a float convolution with the folded norm of the current width."""
    act = act_of(module.norm)
    conv = _conv(module.layer, *module.folded())
    return conv if act is None else nn.Sequential(conv, act)
