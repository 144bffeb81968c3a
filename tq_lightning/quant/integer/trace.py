"""Trace a network for integer mode, and classify its operations by their effect on codes."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.layers import LAYER_NORMS
from tq_lightning.quant.switchable_norm import PerWidthNorm, per_width_norms

# modules without effect in evaluation mode
NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ADDS = (operator.add, operator.iadd, torch.add)
# operations that move codes without computing; padding with 0 is code 0 only for unsigned codes
_MOVES = (nn.MaxPool2d, nn.Flatten)
_MOVE_METHODS = ("flatten", "view", "reshape", "contiguous")


class _Tracer(fx.Tracer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        norms = per_width_norms(model)
        self.of_norms = {id(t) for norm in norms for t in (*norm.parameters(), *norm.buffers())}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if id(attr_val) in self.of_norms:
            raise fx.proxy.TraceError(f"{attr} of a norm is read, which depends on the width")
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return (
            parametrize.is_parametrized(m)
            or isinstance(m, (PerWidthNorm, ActivationQuantizer, _BatchNorm, *LAYER_NORMS))
            or super().is_leaf_module(m, qualified_name)
        )


def in_leaf(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Return True if a layer is part of a module of `torch.nn`, which may read its weight."""
    parts = name.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    is_leaf = fx.Tracer().is_leaf_module
    return any(is_leaf(modules[n], n) for n in above if n in modules)


def has_hooks(module: nn.Module) -> bool:
    """Return True if a module or a part of it has forward hooks, which no kernel can call."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class TracedNetwork:
    """Graph of a model, without modules that have no effect in evaluation mode.

    Args:
        model: the model, in evaluation mode.
        modules: {name: module} of the model.

    Attributes:
        graph: the graph. Quantized layers, norms and activation quantizers are single nodes.
        order: {node: position in the graph}.

    Raises:
        Exception: the model cannot be traced; torch.fx and the model itself choose the class.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.model, self.modules = model, modules
        self.graph = fx.GraphModule(model, _Tracer(model).trace(model)).graph
        for node in list(self.graph.nodes):
            if node.op == "call_module" and not node.args and len(node.kwargs) == 1:
                node.args, node.kwargs = tuple(node.kwargs.values()), {}
            views = node.op == "call_method" and node.target == "view"
            if views and not any(isinstance(a, torch.dtype) for a in node.args):
                node.target = "reshape"  # kernels return channels_last tensors
            if isinstance(self.module(node), NO_OPS) or _takes_all(node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls; None for other nodes and modules with hooks."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return None if module is None or has_hooks(module) else module

    def moves(self, node: fx.Node, signed: bool) -> bool:
        """Return True if a node only moves the codes of its first argument."""
        if not node.args:
            return False
        if node.op == "call_module":
            return isinstance(self.module(node), _MOVES)
        if node.op == "call_method":
            return node.target in _MOVE_METHODS
        if node.target is F.pad:
            mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
            value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
            return bool(mode == "constant" and not value and not signed)
        if node.target is operator.getitem:
            at = node.args[1]
            return all(isinstance(i, slice) for i in (at if isinstance(at, tuple) else (at,)))
        return node.target is torch.flatten


def _takes_all(node: fx.Node) -> bool:
    """Return True if a node is a slice of a whole tensor, such as x[:, :, ::1, ::1]."""
    if node.target is not operator.getitem:
        return False
    at = node.args[1]
    parts = at if isinstance(at, tuple) else (at,)
    whole = (slice(None), slice(None, None, 1))
    return all(isinstance(part, slice) and part in whole for part in parts)


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the only node that reads a tensor, or None if there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def adds(node: fx.Node) -> bool:
    """Return True if a node is the sum of two tensors."""
    known = node.target in _ADDS or (node.op == "call_method" and node.target in ("add", "add_"))
    tensors = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    distinct = tensors and node.args[0] is not node.args[1]
    return bool(known) and bool(distinct) and not node.kwargs
