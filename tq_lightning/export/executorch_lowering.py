"""Lower a network to the bytes of an ExecuTorch program, and check that the runtime loads them."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import nn

from tq_lightning.errors import UserError, message_of

Backend = Callable[[Any], bytes]  # exported program -> bytes of an ExecuTorch program


class LoweringError(UserError):
    """PyTorch or ExecuTorch can't express a network."""


def xnnpack_backend() -> Backend:
    """Return a function that lowers an exported program to the bytes of an ExecuTorch program."""
    try:
        from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except Exception as error:  # an ExecuTorch built for another PyTorch fails in many ways
        reason = message_of(error, 120)
        raise UserError(
            f"--format executorch needs ExecuTorch for PyTorch {torch.__version__} ({reason}); "
            "pip install 'tq_lightning[executorch]' in a separate environment"
        ) from error

    def to_bytes(exported: Any) -> bytes:
        _dequantize_for_each_reader(exported)
        partitioners = [
            XnnpackPartitioner(
                config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True
            ),
            XnnpackPartitioner(),
        ]
        edge = to_edge_transform_and_lower(exported, partitioner=partitioners)
        return edge.to_executorch().buffer

    return to_bytes


def lower(network: nn.Module, size: tuple[int, ...], backend: Backend) -> bytes:
    """Return the bytes of a program for inputs (1, *size).

    Raises:
        LoweringError: PyTorch or ExecuTorch can't express the network, or the runtime can't load
            the program.
    """
    try:
        with torch.no_grad():
            exported = torch.export.export(network.eval(), (torch.zeros(1, *size),), strict=False)
            buffer = backend(exported)
    except Exception as error:  # torch.export and the lowering raise many types
        reason = message_of(error, 200)
        raise LoweringError(
            f"ExecuTorch can't express this network ({type(error).__name__}: {reason})"
        ) from error
    _check_that_it_loads(buffer)
    return buffer


def _check_that_it_loads(buffer: bytes) -> None:
    """Load a program once, because XNNPACK chooses its kernels only then.

    It refuses, for example, the fixed ranges of a network with random weights, where the range of a
    sum exceeds that of the next layer by far.

    Raises:
        LoweringError: ExecuTorch's runtime can't load the program.
    """
    try:
        from executorch.runtime import Runtime
    except ImportError:  # a build without the Python runtime
        return
    log = io.StringIO()
    try:
        with redirect_stderr(log):  # the runtime logs there
            program = Runtime.get().load_program(buffer)
            program.load_method("forward")
    except RuntimeError as error:
        lines = [line for line in log.getvalue().splitlines() if "xnn" in line.lower()]
        reason = lines[0].partition("] ")[2] if lines else message_of(error, 200)
        raise LoweringError(f"ExecuTorch's runtime can't load this program ({reason})") from error


def _dequantize_for_each_reader(exported: Any) -> None:
    """Copy each dequantize node with several readers, so that each reader has its own.

    XNNPACK's lowering matches dequantize, operation and quantize as one pattern. It fails in
    ChannelsLastTaggedReshapePass if a dequantized tensor has readers in several partitions.
    """
    graph = exported.graph_module.graph
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in list(graph.nodes):
        if node.target == dequantize:
            for reader in list(node.users)[1:]:
                with graph.inserting_after(node):
                    own = graph.node_copy(node)
                reader.replace_input_with(node, own)
    exported.graph_module.recompile()
