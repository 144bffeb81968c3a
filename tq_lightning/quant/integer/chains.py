"""Chains: an integer layer and the following operations that its kernel includes."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import fx, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.integer.activations import ActivationCodes, TrainedCodes
from tq_lightning.quant.integer.kernels import NO_ACT, RELU, kernel_act
from tq_lightning.quant.integer.norms import act_of, folds
from tq_lightning.quant.integer.trace import TracedNetwork, adds, only_user

_RELU_CALLS = (torch.relu, F.relu, "relu", "relu_")


class Chain:
    """An integer layer and the following nodes that its kernel includes.

    Attributes:
        layer: node of the layer.
        end: last node of the chain.
        norm: module of the batch norm, or None.
        add: node of the sum with a shortcut, or None.
        residual: node of the shortcut.
        act: kernel activation.
        out: codes of an activation quantizer at the end, or None.
        inside: all nodes of the chain, in order.
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
        """Append a node."""
        self.end = node
        self.inside.append(node)

    def take_act(self, act: nn.Module | None, network: TracedNetwork) -> bool:
        """Include an activation in the kernel. Return False if the kernel does not support it."""
        if isinstance(act, ActivationQuantizer):
            self.out = TrainedCodes(act)
            return True
        known = kernel_act(act)
        linear = isinstance(network.module(self.layer), nn.Linear)
        if known is None or (self.add is not None and known != RELU):
            return False
        if known.name == "gelu" and not linear:
            return False
        self.act = known
        return True


def find_chains(network: TracedNetwork, layers: Iterable[fx.Node]) -> list[Chain]:
    """Extend every integer layer by the operations that its kernel can include.

    Args:
        network: the traced network.
        layers: nodes of the integer layers, in order.

    Returns:
        One chain for each layer, in order. No two chains share a node.
    """
    chains = [Chain(node) for node in layers]
    for chain in chains:
        node = only_user(chain.end)
        norm = None if node is None else network.module(node)
        # after a linear layer on tokens (batch, tokens, out), a norm has the tokens as channels
        is_conv = isinstance(network.module(chain.layer), nn.Conv2d)
        if node is not None and is_conv and folds(norm):
            chain.norm = norm
            chain.take(node)
            chain.take_act(act_of(norm), network)
    _take_shortcuts(network, chains)
    for chain in chains:
        node = only_user(chain.end)
        if node is None or chain.act != NO_ACT or chain.out is not None:
            continue
        act = network.module(node)
        if node.op != "call_module" and node.target in _RELU_CALLS:  # not a module named "relu"
            act = nn.ReLU()
        if chain.take_act(act, network):
            chain.take(node)
    return chains


def _take_shortcuts(network: TracedNetwork, chains: Iterable[Chain]) -> None:
    """Assign each residual add to the later of the convolutions that it adds."""
    ends = {c.end: c for c in chains if c.act == NO_ACT and c.out is None}
    for node in network.graph.nodes:
        if not adds(node):
            continue
        hosts = [arg for arg in node.args[:2] if arg in ends and only_user(arg) is node]
        hosts = [h for h in hosts if isinstance(network.module(ends[h].layer), nn.Conv2d)]
        if hosts:
            host = max(hosts, key=lambda n: network.order[n])
            residual = node.args[1] if node.args[0] is host else node.args[0]
            if residual.op == "get_attr":  # a parameter, added in float
                continue
            chain = ends[host]
            chain.add, chain.residual = node, residual
            chain.take(node)
