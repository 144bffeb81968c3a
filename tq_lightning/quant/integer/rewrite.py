"""rewrite(): the graph of a model -> the graph of its integer layers and the codes between them."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.integer.activations import ActivationCodes, Dequantize, Quantize
from tq_lightning.quant.integer.chains import Chain, find_chains
from tq_lightning.quant.integer.code_flow import CodeFlow, input_codes
from tq_lightning.quant.integer.float_conv import FloatConv
from tq_lightning.quant.integer.layer import IntegerLayer
from tq_lightning.quant.integer.norms import folds
from tq_lightning.quant.integer.plan import IntegerPlan
from tq_lightning.quant.integer.trace import TracedNetwork, only_user


def rewrite(plan: IntegerPlan) -> fx.GraphModule | None:
    """Trace a model and rewrite it for integer layers.

    Args:
        plan: the layers; those without an activation range are marked in it.

    Returns:
        The new network; None if torch.fx cannot trace the model.
    """
    try:
        network = TracedNetwork(plan.model, plan.modules)
    except Exception:  # the network may be the user's: it may raise anything
        return None
    into = input_codes(network, plan)
    flow = CodeFlow(network, into, find_chains(network, into))
    return _NewGraph(plan, network, flow).build()


class _NewGraph:
    """The new graph, built node by node.

    Attributes:
        made: {name: module or tensor} of the new graph.
        as_codes: {old node: new node of its codes}.
        requantized: [(old node, codes, new node)], for layers that read codes of another range.
        as_float: {old node: new node of its float value}.
    """

    def __init__(self, plan: IntegerPlan, network: TracedNetwork, flow: CodeFlow) -> None:
        self.plan, self.network, self.flow = plan, network, flow
        self.new = fx.Graph()
        self.made: dict[str, Any] = {}
        self.as_codes: dict[fx.Node, fx.Node] = {}
        self.requantized: list[tuple[fx.Node, ActivationCodes, fx.Node]] = []
        self.as_float: dict[fx.Node, fx.Node] = {}

    def build(self) -> fx.GraphModule:
        """Return the new graph, with one group of nodes for each node or chain of the old one."""
        folded = {node.args[0]: node for node in self.network.graph.nodes if self.takes_conv(node)}
        for node in self.network.graph.nodes:
            chain = self.flow.chain_of.get(node)
            if node in folded:
                self.add_float_conv(node, folded[node])
            elif chain is None and node not in folded.values():
                self.add_node(node)
            elif chain is not None and node is chain.end:
                self.add_chain(chain)
        return fx.GraphModule(self.made, self.new, "IntegerNetwork")

    def takes_conv(self, norm: fx.Node) -> bool:
        """Return True if a node is a batch norm that can be folded into a float convolution."""
        conv = norm.args[0] if norm.args else None
        if not isinstance(conv, fx.Node) or only_user(conv) is not norm:
            return False
        module = self.network.module(conv)
        plain = isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward
        return plain and conv not in self.flow.chain_of and folds(self.network.module(norm))

    # -- nodes -------------------------------------------------------------------------------------
    def add_node(self, node: fx.Node) -> None:
        """Add a node outside of chains: it quantizes, moves codes, or computes in float."""
        codes = None if node.op == "output" else self.flow.codes_of(node)
        module = self.network.module(node)
        if isinstance(module, ActivationQuantizer) and codes is not None:
            value = self.read_float(node.args[0])
            self.as_codes[node] = self.call("quantize", Quantize(codes, self.plan.width), value)
        elif codes is not None and self.flow.is_moved(node):
            if isinstance(module, nn.MaxPool2d):
                moved = self.read_codes(node.args[0])  # type: ignore[arg-type]
                self.as_codes[node] = self.call("pool", CodePool(module), moved)
            else:
                # other arguments, such as the sizes of a view, are not codes
                self.as_codes[node] = self.new.node_copy(
                    node, lambda n: self.read_codes(n) if n is node.args[0] else self.read_float(n)
                )
                self.keep_module(node)
        else:
            self.as_float[node] = self.new.node_copy(node, self.read_float)
            self.keep_module(node)

    def add_float_conv(self, conv: fx.Node, norm: fx.Node) -> None:
        """Add a float convolution with its batch norm folded."""
        name, modules = str(conv.target), self.plan.modules
        made = FloatConv(modules[name], modules[str(norm.target)], self.plan.width)  # type: ignore[arg-type]
        self.as_float[norm] = self.call(name, made, self.read_float(conv.args[0]))

    def add_chain(self, chain: Chain) -> None:
        """Add the integer layer of a chain, and the quantizers around it."""
        into = self.flow.into[chain.layer]
        a = self.read_codes(chain.layer.args[0], into)  # type: ignore[arg-type]
        out = chain.out or self.flow.codes_of(chain.end)
        residual = chain.residual
        shortcut: ActivationCodes | None = None
        after: ActivationCodes | None = None
        if residual is not None and out is not None:
            shortcut = self.flow.codes_of(residual)
            if shortcut is None or shortcut.signed or residual not in self.as_codes:
                shortcut, after, out = None, out, None
        name = str(chain.layer.target)
        layer = IntegerLayer(
            name,
            self.plan.modules[name],
            self.plan.width,
            into,
            chain.norm,
            chain.act,
            out,
            shortcut,
            self.plan.exact_sums,
            self.plan.exact_weights(into),
        )
        args = [a]
        if residual is not None:
            codes = shortcut is not None
            read = self.as_codes[residual] if codes else self.read_float(residual)
            free = self.flow.is_free(residual, chain)
            args.append(self.call("shortcut", OwnedCopy(free), read))
        value = self.call(name, layer, *args)
        if after is not None:
            value = self.call("quantize", Quantize(after, self.plan.width), value)
        if (out or after) is None:
            self.as_float[chain.end] = value
        else:
            self.as_codes[chain.end] = value

    def keep_module(self, node: fx.Node) -> None:
        """Reuse the module or tensor that a copied node refers to."""
        if node.op == "call_module":
            self.made[str(node.target)] = self.plan.modules[str(node.target)]
        elif node.op == "get_attr":
            value: Any = self.plan.model
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self.made[str(node.target)] = value

    def call(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        """Add a module and a node that calls it."""
        base, i = name, 1
        while name in self.made:
            name, i = f"{base}_{i}", i + 1
        self.made[name] = module
        return self.new.call_module(name, args)

    # -- values of the old graph -------------------------------------------------------------------
    def read_codes(self, node: fx.Node, codes: ActivationCodes | None = None) -> fx.Node:
        """Return the codes of a tensor, quantized from its float value if necessary.

        Args:
            node: node of the old graph.
            codes: codes to read; None for the codes that represent the tensor.
        """
        own = self.flow.codes_of(node)
        codes = codes or own
        assert codes is not None
        if node in self.as_codes and own == codes:
            return self.as_codes[node]
        for other, known, value in self.requantized:
            if other is node and known == codes:
                return value
        made = self.call("quantize", Quantize(codes, self.plan.width), self.read_float(node))
        if own == codes:
            self.as_codes[node] = made
        else:
            self.requantized.append((node, codes, made))
        return made

    def read_float(self, node: Any) -> Any:
        """Return the float value of a tensor, dequantized from its codes if necessary."""
        if node not in self.as_float:
            codes = self.flow.codes_of(node)
            assert codes is not None
            module = Dequantize(codes, self.plan.width)
            self.as_float[node] = self.call("dequantize", module, self.as_codes[node])
        return self.as_float[node]


class CodePool(nn.Module):
    """Max pooling of uint8 codes in float, because PyTorch's uint8 kernel lacks some image sizes.

    Args:
        pool: the pooling layer.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, a: Tensor) -> Tensor:
        """Return the largest code of each window."""
        return self.pool(a.float()).to(torch.uint8)


class OwnedCopy(nn.Module):
    """Return a tensor that a kernel may overwrite: the input if nothing else reads it, or a copy.

    Args:
        free: True if nothing else reads the input.
    """

    def __init__(self, free: bool) -> None:
        super().__init__()
        self.free = free

    def forward(self, x: Tensor | float) -> Tensor:
        """Return `x` or a copy, in the memory format of the kernels."""
        if not isinstance(x, Tensor):  # a number that the network computes, such as a size
            return torch.tensor(float(x))
        if x.dim() != 4:  # broadcast by the sum, which does not overwrite it
            return x
        if self.free and x.is_contiguous(memory_format=torch.channels_last):
            return x
        return x.clone(memory_format=torch.channels_last)
