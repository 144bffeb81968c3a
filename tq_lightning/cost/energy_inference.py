"""Energy model (not a measurement) of an inference on two accelerators, with ZigZag.

ZigZag (zigzag-dse), an optional package, searches for the best mapping of the loops of a layer to
an accelerator. It sums the energy of multiplications and of all memory accesses. Layers are
simulated with weights of 8 bits and of 1 bit. The energy in between is linear in the width, because
the traffic of weights is.
"""

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tq_lightning.errors import UserError, message_of
from tq_lightning.records import Energy

# label -> name of ZigZag's own description of the accelerator
ACCELERATORS = {"TPU-like": "tpu_like", "Edge-TPU-like": "edge_tpu_like"}
WIDTHS = (8, 4, 2, 1)
ACTIVATION_BITS, SUM_BITS = 8, 16
SOURCE = (
    "ZigZag (zigzag-dse): L. Mei et al., ZigZag: enlarging joint architecture-mapping design space "
    "exploration for DNN accelerators, IEEE Transactions on Computers 2021; accelerators and their "
    "costs per access as included in the package"
)
ASSUMPTIONS = (
    "one image; the quantized convolutions and linear layers, each with its own best mapping for "
    "energy; activations of 8 bits, partial sums of 16",
    "every layer reads its input and its weights from DRAM and writes its output there",
    "a multiplication costs the same at every width; weights are packed in DRAM and SRAM, and a "
    "register is read with at least 8 bits",
    "simulated at 8 and 1 bit, linear between them",
    "layers left in float, norms, activations, residual adds and leakage are not counted",
)


class LayerShape(NamedTuple):
    """Loop sizes of a convolution. A linear layer has a 1 x 1 kernel and its tokens as columns."""

    groups: int
    out: int
    inside: int
    rows: int
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]


def inference_energy(model: nn.Module, names: set[str], size: tuple[int, ...]) -> dict[str, Energy]:
    """Model the energy of an inference at 8, 4, 2 and 1 bits of weights.

    Args:
        model: float network, on the meta device if possible.
        names: names of the quantized layers.
        size: (channels, height, width) of an image.

    Returns:
        Accelerator -> energy, with compute_pj, weights_pj and activations_pj by width.

    Raises:
        UserError: ZigZag is not installed, or the network does not run on images of this size.
    """
    simulate = _simulator()
    shapes = Counter(layer_shapes(model, names, size))
    result = {}
    for label, accelerator in ACCELERATORS.items():
        ends = {bits: Counter[str]() for bits in (8, 1)}
        for shape, count in shapes.items():
            for bits, total in ends.items():
                for kind, pj in simulate(shape, accelerator, bits).items():
                    total[kind] += count * pj  # type: ignore[assignment]
        result[label] = Energy(
            list(ASSUMPTIONS), {}, SOURCE, {bits: _between(ends, bits) for bits in WIDTHS}
        )
    return result


def _between(ends: dict[int, Counter[str]], bits: int) -> dict[str, float]:
    share = (bits - 1) / 7
    return {kind: share * ends[8][kind] + (1 - share) * ends[1][kind] for kind in ends[8]}


def layer_shapes(model: nn.Module, names: set[str], size: tuple[int, ...]) -> list[LayerShape]:
    """Return the shapes of the named convolutions and linear layers, in the order of their calls.

    Raises:
        UserError: the network does not run on an image of this size.
    """
    found: list[LayerShape] = []

    def note(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            (rows, columns), groups = out.shape[-2:], module.groups
            channels = (module.out_channels // groups, module.in_channels // groups)
            kernel, stride = _pair(module.kernel_size), _pair(module.stride)
            found.append(LayerShape(groups, *channels, rows, columns, kernel, stride))
        elif isinstance(module, nn.Linear):
            tokens = out.numel() // module.out_features
            found.append(
                LayerShape(1, module.out_features, module.in_features, 1, tokens, (1, 1), (1, 1))
            )

    handles = [
        module.register_forward_hook(note)
        for name, module in model.named_modules()
        if name in names
    ]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size, device=device))
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = message_of(error, 100)
        raise UserError(f"the network does not run on an image of {size} ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _simulator() -> Any:
    """Return a function (shape, accelerator, bits) -> picojoules by kind."""
    try:
        import zigzag
        from zigzag.api import get_hardware_performance_zigzag
    except ImportError as error:
        raise UserError(
            f"--energy needs the package zigzag-dse ({error}); pip install 'tq_lightning[energy]'"
        ) from error
    inputs = Path(zigzag.__file__).parent / "inputs"

    def simulate(shape: LayerShape, accelerator: str, bits: int) -> dict[str, float]:
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

    return simulate


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
