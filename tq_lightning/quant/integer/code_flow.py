"""Code flow: which tensors of a traced network are uint8 codes, and of which range."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.integer.activations import ActivationCodes, TrainedCodes
from tq_lightning.quant.integer.chains import Chain
from tq_lightning.quant.integer.plan import NO_RANGE, IntegerPlan
from tq_lightning.quant.integer.trace import TracedNetwork


def trained_source(network: TracedNetwork, node: Any) -> TrainedCodes | None:
    """Return the codes of the activation quantizer behind a tensor, past moves of codes."""
    while isinstance(node, fx.Node):
        module = network.module(node)
        if isinstance(module, ActivationQuantizer):
            return TrainedCodes(module)
        if not network.moves(node, signed=False):
            return None
        node = node.args[0]
    return None


def input_codes(network: TracedNetwork, plan: IntegerPlan) -> dict[fx.Node, ActivationCodes]:
    """Find the codes that each integer layer reads: trained, else calibrated.

    The plan notes the layers that have neither.
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
    return into


class CodeFlow:
    """Tensors that are passed on as codes: those that only integer layers read.

    Args:
        network: The traced network.
        into: What `input_codes` returned.
        chains: What `chains.find_chains` returned.

    Attributes:
        chain_of: {node: the chain that it is in}.
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
        """Return the codes that stand for a tensor wherever it is read, or None if it is float."""
        if node not in self._codes:
            self._codes[node] = None  # while it is being found
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
        wanted = [self.into[user] for user in node.users if user in self.into]
        if not wanted or any(codes != wanted[0] for codes in wanted):
            return None
        return wanted[0] if all(self._can_read(u, node, wanted[0]) for u in node.users) else None

    def _can_read(self, user: fx.Node, node: fx.Node, codes: ActivationCodes) -> bool:
        """Whether a user of a tensor can read codes of it."""
        if user in self.into:
            return True
        chain = self.chain_of.get(user)
        if chain is not None and chain.add is user and chain.residual is node:
            return not codes.signed
        return self.network.moves(user, codes.signed) and all(
            self._can_read(u, user, codes) for u in user.users
        )

    def is_moved(self, node: fx.Node) -> bool:
        """Whether a node moves codes that stand for its first argument, to codes of its own."""
        codes = self.codes_of(node)
        first = node.args[0] if node.args else None
        return (
            codes is not None
            and self.network.moves(node, codes.signed)
            and isinstance(first, fx.Node)
            and self.codes_of(first) is not None
        )

    def is_free(self, node: fx.Node, chain: Chain) -> bool:
        """Whether nothing reads a shortcut after its sum, so that it can be overwritten."""
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
