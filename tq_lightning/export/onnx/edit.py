"""Edit an ONNX graph: find the producer and the consumers of a tensor, and replace them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class GraphEditor:
    """Nodes and constants of a graph, with lookups and edits.

    Nodes are appended in any order. `finish` sorts them and drops those that no output depends on.

    Args:
        model: ONNX model; `finish` writes the edited graph to it.

    Attributes:
        nodes: nodes of the graph, in any order.
        outputs: names of the outputs of the graph.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.outputs = {output.name for output in model.graph.output}
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._tensors[node.output[0]] = node.attribute[0].t

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a constant tensor; None if it is computed by a node or an input."""
        tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def set(self, name: str, value: np.ndarray | onnx.TensorProto) -> str:
        """Add or replace a constant. Return its name."""
        if not isinstance(value, onnx.TensorProto):
            value = numpy_helper.from_array(np.asarray(value), name)
        self._tensors[name] = value
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node with one output. Return the name of the output."""
        self.nodes.append(
            helper.make_node(op, inputs, [output], name=f"{output}/node", **attributes)
        )
        return output

    def producer(self, name: str) -> onnx.NodeProto | None:
        """Return the node that computes a tensor; None for constants and inputs."""
        return next((node for node in self.nodes if name in node.output), None)

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """Return the nodes that read the values of a tensor, which excludes `Shape` and `Size`."""
        return [
            node for node in self.nodes if name in node.input and node.op_type not in _SHAPE_ONLY
        ]

    def only_consumer(self, name: str, op: str) -> onnx.NodeProto | None:
        """Return the only consumer of an inner tensor if it is an `op`, else None."""
        readers = self.consumers(name)
        if len(readers) == 1 and readers[0].op_type == op and name not in self.outputs:
            return readers[0]
        return None

    def redirect(self, old: str, new: str, keep: tuple[onnx.NodeProto, ...] = ()) -> None:
        """Replace `old` by `new` in the inputs of all nodes except those in `keep`."""
        for node in self.nodes:
            if not any(node is kept for kept in keep):
                for i, name in enumerate(node.input):
                    if name == old:
                        node.input[i] = new

    def remove(self, node: onnx.NodeProto) -> None:
        """Remove a node. Another node may then produce its output."""
        self.nodes = [other for other in self.nodes if other is not node]

    def drop_zero_biases(self) -> None:
        """Drop the zero biases that PyTorch's exporter adds to convolutions without a bias.

        Runtimes can then fuse the convolution with the batch norm that follows it.
        """
        for node in self.nodes:
            if node.op_type == "Conv" and len(node.input) > 2 and self._is_zero(node.input[2]):
                del node.input[2]

    def _is_zero(self, name: str) -> bool:
        while (node := self.producer(name)) is not None and node.op_type in ("Expand", "CastLike"):
            name = node.input[0]
        value = self.constant(name)
        return value is not None and not value.any()

    def finish(self) -> onnx.ModelProto:
        """Write the nodes that the outputs depend on, sorted, and their constants to the model."""
        made = {name: node for node in self.nodes for name in node.output}
        order: list[onnx.NodeProto] = []
        done: set[int] = set()
        for root in self.outputs:
            for node in _depth_first(made, root):
                if id(node) not in done:
                    done.add(id(node))
                    order.append(node)
        used = {name for node in order for name in node.input}
        made_here = {name for node in order for name in node.output}
        graph = self.model.graph
        kept = [t for n, t in self._tensors.items() if n in used and n not in made_here]
        info = [v for v in graph.value_info if v.name in made_here]
        for field, values in (("initializer", kept), ("value_info", info), ("node", order)):
            del getattr(graph, field)[:]
            getattr(graph, field).extend(values)
        return self.model


# they read the shape or the type of their first input, not its values
_SHAPE_ONLY = ("Shape", "Size")


def _depth_first(made: dict[str, onnx.NodeProto], root: str) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that compute a tensor in topological order."""
    seen: set[int] = set()
    todo: list[tuple[str, bool]] = [(root, False)]
    while todo:
        name, ready = todo.pop()
        node = made.get(name)
        if node is None:
            continue
        if ready:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            todo.append((name, True))
            todo.extend((source, False) for source in node.input)
