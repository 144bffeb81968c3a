"""Runtimes that bench_latency.py times: each yields its runs of one network at its widths.

To add a runtime, write such a function and a row of `RUNTIMES`.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tq_lightning.export.onnx import integer
from tq_lightning.export.onnx.graph import float_graph

WIDTHS = (8, 4, 2, 1)
QUIET = {"log_severity_level": 4}


class Network(NamedTuple):
    """A network to time: its packed file, its float model, and images to calibrate on."""

    name: str
    packed: Path
    model: nn.Module
    images: torch.Tensor
    ranges: dict[str, Any] | None
    folder: Path


class Run(NamedTuple):
    """A network in a runtime: images (batch, channels, height, width) -> logits.

    `start(threads)` makes the session. `bits` is None for float and for a peer's one width.
    """

    runtime: str
    label: str
    bits: int | None
    file_bytes: int
    start: Callable[[int], Callable[[np.ndarray], np.ndarray]]


def keep_traces() -> None:
    """Trace a network once per width, not once per graph: tracing takes longer than all else."""
    traced: dict[tuple[str, int], Any] = {}

    def cached(model: nn.Module) -> Any:
        header: dict[str, Any] = model.tq_file
        key = (header["path"], integer.width_of(model).bits)
        if key not in traced:
            traced[key] = float_graph(model)
        return copy.deepcopy(traced[key])

    integer.float_graph = cached


def graphs(network: Network, runtime: str) -> Iterator[tuple[str, int | None, Path]]:
    """(label, bits, file) of the float graph and of the integer graph of every width."""
    yield "float", None, float_onnx(network)
    for bits in WIDTHS:
        path = network.folder / f"{network.name}.{runtime}.{bits}.onnx"
        integer.export_integer(network.packed, path, bits, runtime, ranges=network.ranges)
        yield f"{bits} bits", bits, path


def float_onnx(network: Network) -> Path:
    """The float network, exported as an engineer would: with the exporter's optimizations."""
    path = network.folder / f"{network.name}.float.onnx"
    if not path.exists():
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            network.model,
            (network.images[:2],),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
        program.save(str(path))
    return path


def _ort_session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    # threads of another session would otherwise spin on the cores of the one being timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def onnxruntime_runs(network: Network) -> Iterator[Run]:
    """Float, our integer graphs, and ONNX Runtime's own static quantization of the float graph."""
    for label, bits, path in graphs(network, "onnxruntime"):
        start = functools.partial(_ort_session, path)
        yield Run("ONNX Runtime", label, bits, path.stat().st_size, start)
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(network.images[:8].split(2))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    ready = network.folder / f"{network.name}.ready.onnx"
    path = network.folder / f"{network.name}.static.onnx"
    quant_pre_process(str(float_onnx(network)), str(ready), skip_symbolic_shape=True)
    quantize_static(str(ready), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    start = functools.partial(_ort_session, path)
    yield Run("ONNX Runtime", "its own static int8", None, path.stat().st_size, start)


def openvino_runs(network: Network) -> Iterator[Run]:
    """Float, and our integer graphs."""
    import openvino

    core = openvino.Core()

    def session(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(str(path), "CPU", options).create_infer_request()
        return lambda images: next(iter(request.infer({"images": images}).values()))

    for label, bits, path in graphs(network, "openvino"):
        start = functools.partial(session, path)
        yield Run("OpenVINO", label, bits, path.stat().st_size, start)


def _torch_call(model: nn.Module, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    def call(images: np.ndarray) -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return call


def torch_runs(network: Network) -> Iterator[Run]:
    """Float, and integer mode where this version has it."""
    floats = sum(4 * p.numel() for p in network.model.parameters())
    yield Run("PyTorch", "float", None, floats, functools.partial(_torch_call, network.model))
    from tq_lightning import load_packed
    from tq_lightning.export.packed.module import MODES

    if "integer" not in MODES:
        raise ImportError("this version has no integer mode for PyTorch")
    for bits in WIDTHS:
        model = load_packed(network.packed, bits=bits)
        model.tq_ranges = network.ranges
        from tq_lightning.quant.integer import integer_model

        start = functools.partial(_torch_call, integer_model(model))
        yield Run("PyTorch", f"{bits} bits", bits, network.packed.stat().st_size, start)


def torchao_runs(network: Network) -> Iterator[Run]:
    """torchao's static int8 of the float network, compiled by Inductor. It takes a compiler."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    def start(threads: int) -> Callable[[np.ndarray], np.ndarray]:
        torch.set_num_threads(threads)
        program = torch.export.export(network.model, (network.images[:1],)).module()
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program, quantizer)
        with torch.no_grad():
            for image in network.images[:8].split(1):
                prepared(image)
        from torch._inductor import config

        config.freezing = True
        return _torch_call(torch.compile(convert_pt2e(prepared)), threads)

    floats = sum(p.numel() for p in network.model.parameters())
    yield Run("torchao", "its own static int8", None, floats, start)


RUNTIMES: dict[str, Callable[[Network], Iterator[Run]]] = {
    "onnxruntime": onnxruntime_runs,
    "openvino": openvino_runs,
    "torch": torch_runs,
    "torchao": torchao_runs,
}


def runs_of(network: Network, names: list[str]) -> Iterator[Run]:
    """Every run of a network; a runtime that is missing or fails is said and left out."""
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield from RUNTIMES[name](network)
            except Exception as error:
                reason = " ".join(str(error).split())[:160]
                print(f"{network.name}, {name}: left out ({type(error).__name__}: {reason})")
