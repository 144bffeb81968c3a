"""Code flow: find the tensors of a traced network that are passed as uint8 codes."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.integer.activations import ActivationCodes, TrainedCodes
from tq_lightning.quant.integer.chains import Chain
from tq_lightning.quant.integer.plan import NO_RANGE, NOT_CALLED, IntegerPlan
from tq_lightning.quant.integer.trace import TracedNetwork


def trained_source(network: TracedNetwork, node: Any) -> TrainedCodes | None:
    """Return the codes of the activation quantizer that produced a tensor, through moves."""
    while isinstance(node, fx.Node):
        module = network.module(node)
        if isinstance(module, ActivationQuantizer):
            return TrainedCodes(module)
        if not network.moves(node, signed=False):
            return None
        node = node.args[0]
    return None


def input_codes(network: TracedNetwork, plan: IntegerPlan) -> dict[fx.Node, ActivationCodes]:
    """Find the codes that each integer layer reads: trained ones, else calibrated ones.

    Layers that have neither are marked in the plan, and so are layers without a node: inside a
    module that torch.fx does not trace into, such as `nn.TransformerEncoderLayer`.
    """
    into: dict[fx.Node, ActivationCodes] = {}
    for node in network.graph.nodes:
        name = str(node.target)
        if node.op != "call_module" or plan.layers.get(name) != "integer":
            continue
        codes = trained_source(network, node.args[0]) or plan.calibrated(name)
        if codes is None:
            plan.layers[name] = NO_RANGE
        else:
            into[node] = codes
    called = {str(node.target) for node in into}
    for name, why in plan.layers.items():
        if why == "integer" and name not in called:
            plan.layers[name] = NOT_CALLED
    return into


class CodeFlow:
    """Tensors that are passed as codes: those that only integer layers read.

    Args:
        network: the traced network.
        into: return value of `input_codes`.
        chains: return value of `chains.find_chains`.

    Attributes:
        chain_of: {node: its chain}.
    """

    def __init__(
        self,
        network: TracedNetwork,
        into: Mapping[fx.Node, ActivationCodes],
        chains: Iterable[Chain],
    ) -> None:
        self.network, self.into = network, into
        self.chain_of = {node: chain for chain in chains for node in chain.inside}
        self._codes: dict[fx.Node, ActivationCodes | None] = {}

    def codes_of(self, node: fx.Node) -> ActivationCodes | None:
        """Return the codes that represent a tensor for all of its users, or None if it is float."""
        if node not in self._codes:
            self._codes[node] = None  # until it is found
            self._codes[node] = self._find_codes(node)
        return self._codes[node]

    def _find_codes(self, node: fx.Node) -> ActivationCodes | None:
        trained = trained_source(self.network, node)
        if trained is not None:
            return trained
        if node.op != "placeholder" and self.network.moves(node, signed=False):
            before = self.codes_of(node.args[0])  # type: ignore[arg-type]
            if before is not None and self.network.moves(node, before.signed):
                return before
        requested = [self.into[user] for user in node.users if user in self.into]
        if not requested or any(codes != requested[0] for codes in requested):
            return None
        return (
            requested[0] if all(self._can_read(u, node, requested[0]) for u in node.users) else None
        )

    def _can_read(self, user: fx.Node, node: fx.Node, codes: ActivationCodes) -> bool:
        """Return True if a user of a tensor can read its codes."""
        if user in self.into:
            return True
        chain = self.chain_of.get(user)
        if chain is not None and chain.add is user and chain.residual is node:
            return not codes.signed
        return self.network.moves(user, codes.signed) and all(
            self._can_read(u, user, codes) for u in user.users
        )

    def is_moved(self, node: fx.Node) -> bool:
        """Return True if a node only moves the codes of its first argument."""
        codes = self.codes_of(node)
        first = node.args[0] if node.args else None
        return (
            codes is not None
            and self.network.moves(node, codes.signed)
            and isinstance(first, fx.Node)
            and self.codes_of(first) is not None
        )

    def is_free(self, node: fx.Node, chain: Chain) -> bool:
        """Return True if nothing reads a shortcut after its sum, so that it can be overwritten."""
        moves, order = self.network.moves, self.network.order
        if moves(node, signed=False) or node.op in ("placeholder", "get_attr"):
            return False
        emitted = {
            user: self.chain_of[user].end if user in self.chain_of else user for user in node.users
        }
        return all(
            user is chain.add or (order[end] < order[chain.end] and not moves(user, signed=False))
            for user, end in emitted.items()
        )
