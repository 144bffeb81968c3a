"""integer_model(): a prepared or packed model -> a model whose quantized layers run on integers.

The model is traced (torch.fx). A tensor that only integer layers read is passed on as uint8 codes,
made in the kernel of the layer before it. A model that cannot be traced gets integer layers one by
one, each of which takes and returns float32.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from tq_lightning.errors import UserError
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.activation_ranges import activation_ranges, quantized_layers
from tq_lightning.quant.bit_width import Width, width_of
from tq_lightning.quant.integer_activations import (
    ActivationCodes,
    CalibratedCodes,
    Dequantize,
    Quantize,
    TrainedCodes,
)
from tq_lightning.quant.integer_kernels import (
    GELU,
    NO_ACT,
    RELU,
    kernel_act,
    missing_kernels,
    sums_are_exact,
)
from tq_lightning.quant.integer_layer import IntegerLayer, refusal, stored_weight
from tq_lightning.quant.layers import LAYER_NORMS
from tq_lightning.quant.switchable_norm import PerWidthNorm

NOT_QUANTIZED = "not quantized"
_ADDS = (operator.add, operator.iadd, torch.add)
_RELU_CALLS = (torch.relu, F.relu, "relu", "relu_")
_DROPPED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# operations that move codes and compute nothing; padding with 0 is code 0 only for unsigned codes
_MOVES = (nn.MaxPool2d, nn.Flatten)
_MOVE_METHODS = ("flatten", "view", "reshape", "contiguous")


class IntegerModel(nn.Module):
    """A model in integer mode.

    Attributes:
        network: The layers, in evaluation mode.
        layers: {name: "integer", or why the layer stays in float}, for all layers with weights.
        tq: The arguments of `prepare`.
    """

    def __init__(self, network: nn.Module, layers: dict[str, str], model: nn.Module) -> None:
        super().__init__()
        self.network, self.layers = network, layers
        for name in ("tq", "tq_file", "tq_ranges", "num_classes", "pretrained_cfg"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (batch, channels, height, width)."""
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    def summary(self) -> str:
        """One line: how many layers run on integers, and which ones do not."""
        rest = [f"{name} ({why})" for name, why in self.layers.items() if why != "integer"]
        count = len(self.layers) - len(rest)
        text = f"{count} of {len(self.layers)} layers run on integers"
        return f"{text}; in float: {', '.join(rest)}" if rest else text


def integer_layers(model: nn.Module) -> list[IntegerLayer]:
    """List the integer layers of a model, in model order."""
    return [m for m in model.modules() if isinstance(m, IntegerLayer)]


def integer_model(model: nn.Module, exact_sums: bool | None = None) -> IntegerModel:
    """Make a model that runs its quantized layers on integers, on CPU.

    Args:
        model: A prepared or packed model with activation ranges: trained with `activations=`, or
            calibrated with `calibrate_activations`. Its modules become part of the result.
        exact_sums: Use 8-bit activation codes at all widths of the weights. None asks the
            processor, see `integer_kernels.sums_are_exact`; without VNNI some widths then use
            7-bit codes.

    Returns:
        The model in evaluation mode. `bit_width` switches its width.

    Raises:
        UserError: The model has no ranges, no layer can run on integers, or this PyTorch has no
            integer kernels.
    """
    reason = missing_kernels()
    if reason is not None:
        raise UserError(f"integer mode is not available: {reason}; pass mode='resident'")
    exact_sums = sums_are_exact() if exact_sums is None else exact_sums
    model = model.eval()
    ranges = activation_ranges(model)
    if not ranges:
        raise UserError(
            "the model has no activation ranges, which integer mode needs; call "
            "calibrate_activations(model, batches), or export it with --calibrate"
        )
    plan = _Plan(model, exact_sums)
    try:
        network: nn.Module = plan.fuse(_trace(model))
    except (fx.proxy.TraceError, TypeError, AttributeError, RuntimeError, NotImplementedError):
        network = plan.replace()
    if all(why != "integer" for why in plan.layers.values()):
        name, why = next(
            (item for item in plan.layers.items() if item[1] != NOT_QUANTIZED),
            ("none", "there are no quantized layers"),
        )
        raise UserError(f"no layer can run on integers; the first is {name}: {why}")
    return IntegerModel(network, plan.layers, model).eval().requires_grad_(False)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return (
            parametrize.is_parametrized(m)
            or isinstance(m, (PerWidthNorm, ActivationQuantizer, _BatchNorm, *LAYER_NORMS))
            or super().is_leaf_module(m, qualified_name)
        )


def _trace(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    return fx.GraphModule(model, tracer.trace(model))


def folds(norm: nn.Module | None) -> bool:
    """Whether a norm can be folded: a batch norm with running statistics, of PyTorch or timm.

    timm's `BatchNormAct2d` holds the activation that follows; a kernel has to apply it too.
    """
    if isinstance(norm, PerWidthNorm):
        return all(folds(one) for one in norm.sets.values())
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return False
    if type(norm).forward is _BatchNorm.forward:
        return True
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    return (
        type(norm).__name__ == "BatchNormAct2d"
        and isinstance(drop, _DROPPED)
        and (isinstance(act, _DROPPED) or (kernel_act(act) or GELU).name != "gelu")
    )


def act_of(norm: nn.Module | None) -> nn.Module | None:
    """Activation inside a norm that `folds`, or None."""
    if isinstance(norm, PerWidthNorm):
        norm = next(iter(norm.sets.values()))
    return getattr(norm, "act", None)


class _Chain:
    """An integer layer and the nodes after it that its kernel takes over.

    Attributes:
        layer: Node of the layer.
        end: Last node of the chain.
        norm: Module of the batch norm, or None.
        add: Node of the sum with a shortcut, or None.
        residual: Node of the shortcut.
        act: Kernel activation.
        out: Codes of an activation quantizer at the end, or None.
    """

    def __init__(self, layer: fx.Node) -> None:
        self.layer = self.end = layer
        self.norm: nn.Module | None = None
        self.add: fx.Node | None = None
        self.residual: fx.Node | None = None
        self.act = NO_ACT
        self.out: ActivationCodes | None = None
        self.inside = [layer]

    def take(self, node: fx.Node) -> None:
        self.end = node
        self.inside.append(node)


class _Plan:
    """Which layers run on integers, and which tensors between them are codes."""

    def __init__(self, model: nn.Module, exact_sums: bool) -> None:
        self.model, self.exact_sums = model, exact_sums
        self.width: Width = width_of(model)
        self.modules = dict(model.named_modules())
        self.ranges = activation_ranges(model)
        self.quantized = quantized_layers(model)
        self.layers: dict[str, str] = {}
        for name, module in self.modules.items():
            if name in self.quantized or (name == "" and "(root)" in self.quantized):
                self.layers[name] = refusal(module) or "integer"
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                self.layers[name] = NOT_QUANTIZED

    # -- layer by layer ----------------------------------------------------------------------------
    def replace(self) -> nn.Module:
        """Replace layers one by one, in place; for models that cannot be traced."""
        if any(isinstance(m, ActivationQuantizer) for m in self.modules.values()):
            raise UserError(
                f"{type(self.model).__name__} cannot be traced, so its trained activation codes "
                "cannot be passed on; load it with mode='resident'"
            )
        for name, why in self.layers.items():
            if why != "integer":
                continue
            codes = self.calibrated(name)
            if codes is None:
                self.layers[name] = "no activation range"
                continue
            layer = self.modules[name]
            made = nn.Sequential(
                Quantize(codes, self.width),
                IntegerLayer(name, layer, self.width, codes, exact_sums=self.exact_sums),
            )
            for holder in self.modules.values():  # a shared layer hangs in several places
                for child, module in list(holder._modules.items()):
                    if module is layer and holder is not made[1]:
                        holder._modules[child] = made
        return self.model

    def calibrated(self, name: str) -> CalibratedCodes | None:
        """Codes of the calibrated range of a layer's input."""
        if name not in self.ranges:
            return None
        level = stored_weight(self.modules[name]).level
        return CalibratedCodes(self.ranges[name], level, self.exact_sums)

    # -- traced ------------------------------------------------------------------------------------
    def fuse(self, traced: fx.GraphModule) -> fx.GraphModule:
        """Rewrite a traced model."""
        self.graph = traced.graph
        _drop(self.graph, self.modules)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.into: dict[fx.Node, ActivationCodes] = {}
        for node in self.graph.nodes:
            name = str(node.target)
            if node.op != "call_module" or self.layers.get(name) != "integer":
                continue
            codes = self.trained_source(node.args[0]) or self.calibrated(name)
            if codes is None:
                self.layers[name] = "no activation range"
            else:
                self.into[node] = codes
        self.chains = self.find_chains()
        self.chain_of = {node: chain for chain in self.chains for node in chain.inside}
        return self.emit()

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def trained_source(self, node: Any) -> TrainedCodes | None:
        """Codes of the activation quantizer behind a tensor, past operations that move codes."""
        while isinstance(node, fx.Node):
            module = self.module(node)
            if isinstance(module, ActivationQuantizer):
                return TrainedCodes(module)
            if not self.moves(node, signed=False):
                return None
            node = node.args[0]
        return None

    def moves(self, node: fx.Node, signed: bool) -> bool:
        """Whether a node only moves the codes of its first argument."""
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

    def find_chains(self) -> list[_Chain]:
        """Extend every integer layer by what its kernel can take over, in order."""
        chains = {node: _Chain(node) for node in self.into}
        for chain in chains.values():
            node = self.only_user(chain.end)
            norm = None if node is None else self.module(node)
            if node is not None and folds(norm):
                chain.norm = norm
                chain.take(node)
                self.take_act(chain, act_of(norm))
        ends = {c.end: c for c in chains.values() if c.act == NO_ACT and c.out is None}
        for node in self.graph.nodes:
            if not self.adds(node):
                continue
            hosts = [arg for arg in node.args[:2] if arg in ends and self.only_user(arg) is node]
            hosts = [h for h in hosts if isinstance(self.module(ends[h].layer), nn.Conv2d)]
            if hosts:
                host = max(hosts, key=lambda n: self.order[n])
                chain = ends[host]
                chain.add = node
                chain.residual = node.args[1] if node.args[0] is host else node.args[0]
                chain.take(node)
        for chain in chains.values():
            node = self.only_user(chain.end)
            if node is None or chain.act != NO_ACT or chain.out is not None:
                continue
            act = nn.ReLU() if node.target in _RELU_CALLS else self.module(node)
            if self.take_act(chain, act):
                chain.take(node)
        return list(chains.values())

    def take_act(self, chain: _Chain, act: nn.Module | None) -> bool:
        """Let a kernel apply an activation, if it can."""
        if isinstance(act, ActivationQuantizer):
            chain.out = TrainedCodes(act)
            return True
        known = kernel_act(act)
        linear = isinstance(self.module(chain.layer), nn.Linear)
        if known is None or (chain.add is not None and known != RELU):
            return False
        if known.name == "gelu" and not linear:
            return False
        chain.act = known
        return True

    def only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def adds(self, node: fx.Node) -> bool:
        """Whether a node is the sum of two tensors."""
        known = node.target in _ADDS or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        tensors = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
        distinct = tensors and node.args[0] is not node.args[1]
        return bool(known) and bool(distinct) and not node.kwargs

    # -- codes -------------------------------------------------------------------------------------
    def codes_of(self, node: fx.Node) -> ActivationCodes | None:
        """Codes that stand for a tensor wherever it is read, or None if it is float."""
        if node not in self._codes:
            self._codes[node] = None  # while it is being found
            self._codes[node] = self._find_codes(node)
        return self._codes[node]

    def _find_codes(self, node: fx.Node) -> ActivationCodes | None:
        trained = self.trained_source(node)
        if trained is not None:
            return trained
        if node.op != "placeholder" and self.moves(node, signed=False):
            before = self.codes_of(node.args[0])  # type: ignore[arg-type]
            if before is not None and self.moves(node, before.signed):
                return before
        wanted = [self.into[user] for user in node.users if user in self.into]
        if not wanted or any(codes != wanted[0] for codes in wanted):
            return None
        return wanted[0] if all(self.reads_codes(u, node, wanted[0]) for u in node.users) else None

    def reads_codes(self, user: fx.Node, node: fx.Node, codes: ActivationCodes) -> bool:
        """Whether a user of a tensor can read codes of it."""
        if user in self.into:
            return True
        chain = self.chain_of.get(user)
        if chain is not None and chain.add is user and chain.residual is node:
            return not codes.signed
        return self.moves(user, codes.signed) and all(
            self.reads_codes(u, user, codes) for u in user.users
        )

    def emit(self) -> fx.GraphModule:
        """Build the new graph."""
        self._codes: dict[fx.Node, ActivationCodes | None] = {}
        self.new = fx.Graph()
        self.made: dict[str, Any] = {}
        self.as_codes: dict[tuple[fx.Node, int], fx.Node] = {}
        self.as_float: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            chain = self.chain_of.get(node)
            if chain is not None:
                if node is chain.end:
                    self.emit_chain(chain)
                continue
            codes = None if node.op == "output" else self.codes_of(node)
            quantizer = self.module(node)
            if isinstance(quantizer, ActivationQuantizer) and codes is not None:
                read = self.read_float(node.args[0])
                self.set_codes(node, self.call("quantize", Quantize(codes, self.width), read))
            elif codes is not None and self.moves(node, codes.signed) and self.has_codes(node):
                pool = self.module(node)
                if isinstance(pool, nn.MaxPool2d):
                    codes_in = self.read_moved(node.args[0])  # type: ignore[arg-type]
                    self.set_codes(node, self.call("pool", CodePool(pool), codes_in))
                    continue
                copied = self.new.node_copy(node, self.read_moved)
                self.keep_module(node)
                self.set_codes(node, copied)
            else:
                self.as_float[node] = self.new.node_copy(node, self.read_float)
                self.keep_module(node)
        return fx.GraphModule(self.made, self.new, "IntegerNetwork")

    def has_codes(self, node: fx.Node) -> bool:
        first = node.args[0] if node.args else None
        return isinstance(first, fx.Node) and self.codes_of(first) is not None

    def read_moved(self, node: fx.Node) -> fx.Node:
        return self.read_codes(node, self.codes_of(node))

    def keep_module(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self.made[str(node.target)] = self.modules[str(node.target)]
        elif node.op == "get_attr":
            value: Any = self.model
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self.made[str(node.target)] = value

    def call(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        """Add a module, and a call of it."""
        base, i = name, 1
        while name in self.made:
            name, i = f"{base}_{i}", i + 1
        self.made[name] = module
        return self.new.call_module(name, args)

    def set_codes(self, node: fx.Node, value: fx.Node) -> None:
        self.as_codes[node, 0] = value

    def read_codes(self, node: fx.Node, codes: ActivationCodes | None) -> fx.Node:
        """Codes of a tensor: those that stand for it, else made from its float value."""
        assert codes is not None
        if (node, 0) in self.as_codes and self.codes_of(node) == codes:
            return self.as_codes[node, 0]
        for (other, key), value in self.as_codes.items():
            if other is node and key and self._requests[key] == codes:
                return value
        made = self.call("quantize", Quantize(codes, self.width), self.read_float(node))
        if self.codes_of(node) == codes:
            self.set_codes(node, made)
        else:
            self._requests[len(self._requests) + 1] = codes
            self.as_codes[node, len(self._requests)] = made
        return made

    def read_float(self, node: Any) -> Any:
        """Float value of a tensor, read from its codes if it has no other."""
        if node not in self.as_float:
            codes = self.codes_of(node)
            assert codes is not None
            module = Dequantize(codes, self.width)
            self.as_float[node] = self.call("dequantize", module, self.as_codes[node, 0])
        return self.as_float[node]

    @property
    def _requests(self) -> dict[int, ActivationCodes]:
        return self.__dict__.setdefault("_asked", {})

    def emit_chain(self, chain: _Chain) -> None:
        node = chain.layer
        into = self.into[node]
        a = self.read_codes(node.args[0], into)  # type: ignore[arg-type]
        out = chain.out or self.codes_of(chain.end)
        residual = chain.residual
        shortcut: ActivationCodes | None = None
        after: ActivationCodes | None = None
        if residual is not None and out is not None:
            shortcut = self.codes_of(residual)
            if shortcut is None or shortcut.signed or (residual, 0) not in self.as_codes:
                shortcut, after, out = None, out, None
        name = str(node.target)
        layer = IntegerLayer(
            name,
            self.modules[name],
            self.width,
            into,
            chain.norm,
            chain.act,
            out,
            shortcut,
            self.exact_sums,
        )
        args = [a]
        if residual is not None:
            read = self.as_codes[residual, 0] if shortcut is not None else self.read_float(residual)
            args.append(self.call("shortcut", OwnedCopy(self.is_free(residual, chain)), read))
        value = self.call(name, layer, *args)
        if after is not None:
            value = self.call("quantize", Quantize(after, self.width), value)
        if (out or after) is None:
            self.as_float[chain.end] = value
        else:
            self.set_codes(chain.end, value)

    def is_free(self, node: fx.Node, chain: _Chain) -> bool:
        """Whether nothing reads a shortcut after its sum, so that it can be overwritten."""
        if self.moves(node, signed=False) or node.op in ("placeholder", "get_attr"):
            return False
        emitted = {
            user: self.chain_of[user].end if user in self.chain_of else user for user in node.users
        }
        return all(
            user is chain.add
            or (self.order[end] < self.order[chain.end] and not self.moves(user, signed=False))
            for user, end in emitted.items()
        )


class CodePool(nn.Module):
    """Max pooling of uint8 codes, by way of float: PyTorch's own refuses images of some size.

    Args:
        pool: The pooling layer.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, a: Tensor) -> Tensor:
        """Return the largest code of each window."""
        return self.pool(a.float()).to(torch.uint8)


class OwnedCopy(nn.Module):
    """Pass on a tensor that a kernel may overwrite: itself if nothing else reads it, else a copy.

    Args:
        free: Nothing else reads it.
    """

    def __init__(self, free: bool) -> None:
        super().__init__()
        self.free = free

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` or a copy, in the memory format of the kernels."""
        if self.free and x.is_contiguous(memory_format=torch.channels_last):
            return x
        return x.clone(memory_format=torch.channels_last)


def _drop(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Remove what does nothing in evaluation mode."""
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _DROPPED):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
