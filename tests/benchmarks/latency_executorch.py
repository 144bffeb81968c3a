"""ExecuTorch server for bench_latency.py, in a separate interpreter because of its PyTorch version.

    PYTHON latency_executorch.py

It reads one JSON object per line: {"export": [network, packed file or null, bits or null, out]}
writes a program, {"load": file, "threads": n, "images": file} loads a program, and {"time": file}
runs it on its images. Each answer is one line.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def export(network: str, packed: str | None, bits: int | None, out: str) -> dict[str, Any]:
    """Write the integer program of a packed file, or the float program of a timm network."""
    from tq_lightning.export.executorch import export_executorch

    if packed is not None and bits is not None:
        found = export_executorch(packed, out, bits)
        return {"integer": len(found.integer), "in_float": len(found.left_in_float)}
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from tq_lightning.models import create_model

    model = create_model(network).eval()
    example = (torch.zeros(1, *model.pretrained_cfg["input_size"]),)
    with torch.no_grad():
        program = torch.export.export(model, example, strict=False)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    Path(out).write_bytes(edge.to_executorch().buffer)
    return {}


class Server:
    """Loaded programs, by file."""

    def __init__(self) -> None:
        self.loaded: dict[str, tuple[Any, torch.Tensor]] = {}
        self.threads = 0

    def load(self, file: str, threads: int, images: str) -> dict[str, Any]:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        if threads != self.threads:
            _unsafe_reset_threadpool(threads)
            self.threads = threads
        program = Runtime.get().load_program(file)
        self.loaded[file] = program, torch.from_numpy(np.load(images))
        return {}

    def time(self, file: str) -> dict[str, Any]:
        program, images = self.loaded[file]
        method = program.load_method("forward")  # cached; reads the memory of the program
        clock, busy = time.perf_counter(), time.process_time()
        method.execute([images])
        return {"clock": time.perf_counter() - clock, "busy": time.process_time() - busy}

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if "version" in asked:
            from importlib.metadata import version

            return {"version": f"ExecuTorch {version('executorch')}"}
        if "export" in asked:
            return export(*asked["export"])
        if "load" in asked:
            return self.load(asked["load"], asked["threads"], asked["images"])
        return self.time(asked["time"])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ExecuTorch prints to stdout, which must carry only answers
    server = Server()
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
