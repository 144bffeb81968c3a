"""Runtimes of bench_latency.py: functions that yield the runs of one network.

To add a runtime, write such a function and a row of `RUNTIMES`. Files that take long to build are
cached in the folder of the network.
"""

import copy
import functools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import Timing
from torch import nn

from tq_lightning import load_packed
from tq_lightning.export.onnx import integer
from tq_lightning.export.onnx.graph import float_graph
from tq_lightning.models import create_model
from tq_lightning.quant.integer.kernels import sums_are_exact
from tq_lightning.quant.integer.model import integer_model

WIDTHS = (8, 4, 2, 1)
HERE = Path(__file__).parent
# interpreter that has ExecuTorch; bench_latency.py sets it
EXECUTORCH = [sys.executable]


class Network(NamedTuple):
    """A network to time, with random weights.

    Attributes:
        name: name in the table.
        timm: name for `create_model`.
        packed: its packed file.
        images: float32 (8, channels, height, width).
        ranges: activation ranges of its quantized layers.
        folder: where graphs and programs are kept.
    """

    name: str
    timm: str
    packed: Path
    images: torch.Tensor
    ranges: dict[str, Any]
    folder: Path

    def float_model(self) -> nn.Module:
        torch.manual_seed(0)
        return create_model(self.timm).eval()

    def float_bytes(self) -> int:
        return sum(4 * p.numel() for p in self.float_model().parameters())

    def bytes_at(self, bits: int) -> int:
        """Return the bytes read from the packed file for one width."""
        read: int = load_packed(self.packed, bits=bits).tq_file["bytes_read"]
        return read


class Session:
    """A network in a runtime: images (batch, channels, height, width) -> logits.

    Args:
        call: The runtime's own call.
    """

    def __init__(self, call: Callable[[np.ndarray], Any]) -> None:
        self.call = call

    def timed(self, images: np.ndarray) -> Timing:
        """Time one run. Return wall seconds and processor seconds of this process."""
        clock, busy = time.perf_counter(), time.process_time()
        self.call(images)
        return Timing(time.perf_counter() - clock, time.process_time() - busy)


class Run(NamedTuple):
    """A network in a runtime.

    Attributes:
        runtime: "ONNX Runtime", ...
        weights: "float", "4 bits", or what a peer makes of the float network.
        bytes: what is read to serve it.
        start: (threads, batch) -> session.
    """

    runtime: str
    weights: str
    bytes: int
    start: Callable[[int, int], Session]


def keep_traces() -> None:
    """Cache the trace of each width, because tracing takes longer than everything else."""
    traced: dict[tuple[str, int], Any] = {}

    def cached(model: nn.Module) -> Any:
        header: dict[str, Any] = model.tq_file
        key = (header["path"], integer.width_of(model).bits)
        if key not in traced:
            traced[key] = float_graph(model)
        return copy.deepcopy(traced[key])

    integer.float_graph = cached


def float_onnx(network: Network) -> Path:
    """Export the float network with the optimizations of the exporter."""
    path = network.folder / f"{network.name}.float.onnx"
    if not path.exists():
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            network.float_model(),
            (network.images[:2],),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
        program.save(str(path))
    return path


def graphs(network: Network, runtime: str) -> Iterator[tuple[str, int, Path]]:
    """Return (weights, bytes, file) of the float graph and of the integer graph of every width."""
    yield "float", network.float_bytes(), float_onnx(network)
    for bits in WIDTHS:
        path = network.folder / f"{network.name}.{runtime}.{bits}.onnx"
        if not path.exists():
            integer.export_integer(network.packed, path, bits, runtime, ranges=network.ranges)
        yield name_of(bits), network.bytes_at(bits), path


def name_of(bits: int) -> str:
    return f"{bits} bit{'s' if bits > 1 else ''}"


# -- ONNX Runtime ----------------------------------------------------------------------------------
def onnxruntime_runs(network: Network) -> Iterator[Run]:
    """Float, our integer graphs, and ONNX Runtime's own static quantization of the float graph."""
    for weights, size, path in graphs(network, "onnxruntime"):
        yield Run("ONNX Runtime", weights, size, functools.partial(_ort_session, path))
    path = network.folder / f"{network.name}.static.onnx"
    if not path.exists():
        _quantize_static(network, path)
    yield Run(
        "ONNX Runtime",
        "its own static int8",
        path.stat().st_size,
        functools.partial(_ort_session, path),
    )


def _ort_session(path: Path, threads: int, batch: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    # otherwise threads of another session would busy-wait on the cores of the one being timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Session(lambda images: session.run(None, {"images": images})[0])


def _quantize_static(network: Network, path: Path) -> None:
    logging.disable(logging.WARNING)  # a line for each norm that has one axis
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(network.images[:4].split(2))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    ready = network.folder / f"{network.name}.ready.onnx"
    quant_pre_process(str(float_onnx(network)), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,  # as its documentation recommends on x86
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=not sums_are_exact(),
    )


# -- OpenVINO --------------------------------------------------------------------------------------
def openvino_runs(network: Network) -> Iterator[Run]:
    """Float, and our integer graphs."""
    import openvino

    core = openvino.Core()

    def session(path: Path, threads: int, batch: int) -> Session:
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        model = core.read_model(str(path))
        model.reshape([batch, *network.images.shape[1:]])
        request = core.compile_model(model, "CPU", options).create_infer_request()
        return Session(lambda images: next(iter(request.infer({"images": images}).values())))

    for weights, size, path in graphs(network, "openvino"):
        yield Run("OpenVINO", weights, size, functools.partial(session, path))


# -- PyTorch ---------------------------------------------------------------------------------------
def torch_runs(network: Network) -> Iterator[Run]:
    """Float, eager, and integer mode."""
    floats = network.float_model()
    yield Run("PyTorch", "float", network.float_bytes(), functools.partial(_eager, floats))
    for bits in WIDTHS:
        model = load_packed(network.packed, bits=bits)
        model.tq_ranges = network.ranges
        start = functools.partial(_eager, integer_model(model))
        yield Run("PyTorch", name_of(bits), network.bytes_at(bits), start)


def _eager(model: nn.Module, threads: int, batch: int) -> Session:
    def call(images: np.ndarray) -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            logits: np.ndarray = model(torch.from_numpy(images)).numpy()
        return logits

    return Session(call)


def torchao_runs(network: Network) -> Iterator[Run]:
    """Float, torchao's static and dynamic int8 of it, all compiled by Inductor with a compiler."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    def compiled(make: Callable[[torch.Tensor], Any], threads: int, batch: int) -> Session:
        from torch._inductor import config

        torch.set_num_threads(threads)
        config.freezing = True
        torch._dynamo.reset()
        return _eager(torch.compile(make(network.images[:batch])), threads, batch)

    def static(images: torch.Tensor) -> Any:
        program = torch.export.export(network.float_model(), (images,)).module()
        quantizer = X86InductorQuantizer()
        reduce_range = not sums_are_exact()
        quantizer.set_global(
            get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
        )
        prepared = prepare_pt2e(program, quantizer)
        with torch.no_grad():
            prepared(images)
        return convert_pt2e(prepared)

    def dynamic(images: torch.Tensor) -> Any:
        model = network.float_model()
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model

    floats = network.float_bytes()
    makes = {"float": (lambda images: network.float_model(), floats), "static int8": (static, 0)}
    if "vit" in network.name:  # it quantizes only linear layers
        makes["dynamic int8"] = (dynamic, 0)
    for weights, (make, size) in makes.items():
        start = functools.partial(compiled, make)
        yield Run("torchao and Inductor", weights, size or floats // 4, start)


# -- ExecuTorch ------------------------------------------------------------------------------------
def executorch_runs(network: Network) -> Iterator[Run]:
    """Yield the float program and our integer programs, in a separate interpreter."""
    programs = {"float": (None, network.folder / f"{network.name}.float.pte")}
    for bits in WIDTHS:
        programs[name_of(bits)] = bits, network.folder / f"{network.name}.{bits}.pte"
    missing = [item for item in programs.values() if not item[1].exists()]
    if missing:
        child = Child()
        for bits, path in missing:
            packed = None if bits is None else str(network.packed)
            child.ask(export=[network.timm, packed, bits, str(path)])
    held: dict[int, Child] = {}
    images = network.folder / f"{network.name}.image.npy"
    np.save(images, network.images[:1].numpy())

    def start(path: Path, threads: int, batch: int) -> Session:
        if batch != 1:
            raise ValueError("programs are written for batches of 1")
        if threads not in held:
            held.clear()
            held[threads] = Child()
        held[threads].ask(load=str(path), threads=threads, images=str(images))
        return ChildSession(held[threads], path)

    for weights, (bits, path) in programs.items():
        size = network.float_bytes() if bits is None else path.stat().st_size
        yield Run("ExecuTorch", weights, size, functools.partial(start, path))


class Child:
    """The interpreter of `EXECUTORCH`, which runs latency_executorch.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [*EXECUTORCH, str(HERE / "latency_executorch.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},  # it may not be installed there
        )
        self.version = self.ask(version=True)["version"]

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise RuntimeError(f"{EXECUTORCH[0]}: {answer['error']}")
        return answer

    def __del__(self) -> None:
        self.process.kill()


class ChildSession(Session):
    """A program that another process loads and times."""

    def __init__(self, child: Child, path: Path) -> None:
        self.child, self.path = child, path

    def timed(self, images: np.ndarray) -> Timing:
        took = self.child.ask(time=str(self.path))
        return Timing(took["clock"], took["busy"])


# -- all -------------------------------------------------------------------------------------------
RUNTIMES: dict[str, Callable[[Network], Iterator[Run]]] = {
    "onnxruntime": onnxruntime_runs,
    "openvino": openvino_runs,
    "torch": torch_runs,
    "executorch": executorch_runs,
    "torchao": torchao_runs,
}
VERSIONS = {
    "onnxruntime": lambda: f"ONNX Runtime {version('onnxruntime')}",
    "openvino": lambda: f"OpenVINO {version('openvino')}",
    "torch": lambda: f"PyTorch {version('torch')}",
    "executorch": lambda: Child().version,
    "torchao": lambda: f"torchao {version('torchao')} with PyTorch {version('torch')}",
}


def runs_of(network: Network, name: str, make: Callable[[Network], Iterator[Run]]) -> list[Run]:
    """Return the runs of a network in a runtime; print a line if it is missing or fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return list(make(network))
        except Exception as error:
            print(f"{network.name}, {name}: left out ({reason_of(error)})", flush=True)
            return []


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
