"""ZigZag's energy of single layers, simulated in parallel processes."""

import contextlib
import io
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tq_lightning.errors import UserError

ACTIVATION_BITS, SUM_BITS = 8, 16


class LayerShape(NamedTuple):
    """Loop sizes of a convolution. A linear layer has a 1 x 1 kernel and its tokens as columns."""

    groups: int
    out: int
    inside: int
    rows: int
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]


class Simulation(NamedTuple):
    """A layer with weights of `bits` bits on an accelerator that ZigZag describes."""

    shape: LayerShape
    accelerator: str
    bits: int


def check_installed() -> None:
    """Import ZigZag.

    Raises:
        UserError: it is not installed.
    """
    try:
        import zigzag.api  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--energy needs the package zigzag-dse ({error}); pip install 'tq_lightning[energy]'"
        ) from error


def simulate_all(
    simulations: Sequence[Simulation], progress: Callable[[int, int], None] | None = None
) -> dict[Simulation, dict[str, float]]:
    """Simulate layers, one process per processor.

    Args:
        simulations: the simulations, each once.
        progress: called with the number of finished simulations and of all.

    Returns:
        {simulation: picojoules by kind}, in the order of `simulations`.
    """
    found = {}
    workers, others = min(len(simulations), _processors()), set(multiprocessing.active_children())
    # a forked process could inherit a lock that a thread of PyTorch holds
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(simulate, one): one for one in simulations}
        try:
            for done, future in enumerate(as_completed(pending), 1):
                found[pending[future]] = future.result()
                if progress is not None:
                    progress(done, len(simulations))
        except BaseException:  # an interrupt does not wait for the simulations that are running
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
    return {one: found[one] for one in simulations}


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def simulate(simulation: Simulation) -> dict[str, float]:
    """Search for the mapping with the least energy; returns its picojoules by kind."""
    import zigzag
    from zigzag.api import get_hardware_performance_zigzag

    shape, accelerator, bits = simulation
    inputs = Path(zigzag.__file__).parent / "inputs"
    with tempfile.TemporaryDirectory() as folder, _quiet():
        found: Any = get_hardware_performance_zigzag(
            [_layer(shape, bits)],
            str(inputs / "hardware" / f"{accelerator}.yaml"),
            str(inputs / "mapping" / f"{accelerator}.yaml"),
            opt="energy",
            dump_folder=folder,
            pickle_filename=f"{folder}/found.pickle",
            lpf_limit=3,
            nb_spatial_mappings_generated=1,
            loma_show_progress_bar=False,
        )
    cost = found[2][0][0]
    memory = {str(k): float(sum(v)) for k, v in cost.mem_energy_breakdown.items()}
    return {
        "compute_pj": float(cost.mac_energy),
        "weights_pj": memory["W"],
        "activations_pj": memory["I"] + memory["O"],
    }


def _layer(shape: LayerShape, bits: int) -> dict[str, Any]:
    """Describe a layer in ZigZag's workload format."""
    (fy, fx), (sy, sx) = shape.kernel, shape.stride
    return {
        "id": 0,
        "name": "layer",
        "operator_type": "Conv",
        "equation": "O[b][g][k][oy][ox]+=W[g][k][c][fy][fx]*I[b][g][c][iy][ix]",
        "dimension_relations": [f"ix={sx}*ox+1*fx", f"iy={sy}*oy+1*fy"],
        "loop_dims": ["B", "K", "G", "OX", "OY", "C", "FX", "FY"],
        "loop_sizes": [1, shape.out, shape.groups, shape.columns, shape.rows, shape.inside, fx, fy],
        "pr_loop_dims": ["IX", "IY"],
        "pr_loop_sizes": [sx * (shape.columns - 1) + fx, sy * (shape.rows - 1) + fy],
        "padding": [[0, 0], [0, 0]],
        "operand_precision": {
            "W": bits,
            "I": ACTIVATION_BITS,
            "O": SUM_BITS,
            "O_final": ACTIVATION_BITS,
        },
        "operand_source": {"I": 0},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence ZigZag's output and remove the handler that it adds to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:], root.level = handlers, level
