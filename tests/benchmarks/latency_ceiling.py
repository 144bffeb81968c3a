"""Speedup of an integer product of large matrices over float, which bounds that of arithmetic.

A network with a larger speedup also saves memory traffic.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from latency_runtimes import Network, Run, Session

from tq_lightning.quant.integer.kernels import Linear

SIZE = 1024
NAME = f"matmul_{SIZE}"
BITS, LARGEST = "8 bits", 63  # two products with activation codes up to 255 fit 16 bits


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 activation codes and int8 weights, both (SIZE, SIZE)."""
    torch.manual_seed(0)
    a = torch.randint(0, 256, (SIZE, SIZE), dtype=torch.uint8)
    return a, torch.randint(-LARGEST, LARGEST + 1, (SIZE, SIZE), dtype=torch.int8)


def _run(runtime: str, weights: str, start: Callable[[int], Callable[[], object]]) -> Run:
    size = SIZE * SIZE * (4 if weights == "float" else 1)

    def session(threads: int, batch: int) -> Session:
        if batch != 1:
            raise ValueError("one product alone")
        call = start(threads)
        return Session(lambda images: call())

    return Run(runtime, weights, size, session)


def torch_runs(network: Network) -> Iterator[Run]:
    a, w = _operands()
    x, floats = a.float(), w.float()
    product = Linear(w, torch.ones(SIZE), torch.zeros(SIZE), a.shape, 1.0)

    def threaded(call: Callable[[], object]) -> Callable[[int], Callable[[], object]]:
        def start(threads: int) -> Callable[[], object]:
            def run() -> object:
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    return call()

            return run

        return start

    yield _run("PyTorch", "float", threaded(lambda: F.linear(x, floats)))
    yield _run("PyTorch", BITS, threaded(lambda: product(a, None)))


def onnxruntime_runs(network: Network) -> Iterator[Run]:
    import onnxruntime
    from onnx import helper, numpy_helper

    a, w = (tensor.numpy() for tensor in _operands())

    def start_of(op: str, x: np.ndarray, y: np.ndarray) -> Callable[[int], Callable[[], object]]:
        kinds = (
            helper.np_dtype_to_tensor_dtype(x.dtype),
            helper.np_dtype_to_tensor_dtype(np.dtype(np.float32 if op == "MatMul" else np.int32)),
        )
        ends = [
            helper.make_tensor_value_info(name, kind, [SIZE, SIZE])
            for name, kind in zip(("x", "z"), kinds, strict=True)
        ]
        node = helper.make_node(op, ["x", "y"], ["z"])
        weights = numpy_helper.from_array(np.ascontiguousarray(y.T), "y")
        graph = helper.make_graph([node], op, ends[:1], ends[1:], [weights])
        opset = [helper.make_opsetid("", 21)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)

        def start(threads: int) -> Callable[[], object]:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            return lambda: session.run(None, {"x": x})

        return start

    yield _run("ONNX Runtime", "float", start_of("MatMul", a.astype("f"), w.astype("f")))
    yield _run("ONNX Runtime", BITS, start_of("MatMulInteger", a, w))


RUNTIMES = {"onnxruntime": onnxruntime_runs, "torch": torch_runs}
