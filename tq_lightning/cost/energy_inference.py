"""Energy model (not a measurement) of an inference on two accelerators, with ZigZag.

ZigZag (zigzag-dse), an optional package, searches for the best mapping of the loops of a layer to
an accelerator. It sums the energy of multiplications and of all memory accesses. Layers are
simulated with weights of 8 bits and of 1 bit. The energy in between is linear in the width, because
the traffic of weights is.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from tq_lightning.cost.zigzag_layers import LayerShape, Simulation, check_installed, simulate_all
from tq_lightning.errors import UserError, message_of
from tq_lightning.records import Energy

# label -> name of ZigZag's own description of the accelerator
ACCELERATORS = {"TPU-like": "tpu_like", "Edge-TPU-like": "edge_tpu_like"}
WIDTHS = (8, 4, 2, 1)
ENDS = (8, 1)  # the simulated widths
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


def inference_energy(
    model: nn.Module,
    names: set[str],
    size: tuple[int, ...],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Energy]:
    """Model the energy of an inference at 8, 4, 2 and 1 bits of weights.

    Args:
        model: float network, on the meta device if possible.
        names: names of the quantized layers.
        size: (channels, height, width) of an image.
        progress: called with the number of finished simulations and of all.

    Returns:
        Accelerator -> energy, with compute_pj, weights_pj and activations_pj by width.

    Raises:
        UserError: ZigZag is not installed, the network does not run on images of this size, or no
            layer can be simulated.
    """
    check_installed()
    found = layer_shapes(model, names, size)
    shapes = Counter(shape for _, shape in found)  # equal layers are simulated once
    if not shapes:
        raise UserError(
            "--energy: the network has no quantized 2-d convolution or linear layer to simulate"
        )
    assumptions = list(ASSUMPTIONS)
    if other := names - {name for name, _ in found}:
        assumptions.append(f"layers of other kinds are not counted: {', '.join(sorted(other))}")
    costs = simulate_all(
        [
            Simulation(shape, accelerator, bits)
            for shape in shapes
            for accelerator in ACCELERATORS.values()
            for bits in ENDS
        ],
        progress,
    )
    totals = {name: {bits: Counter[str]() for bits in ENDS} for name in ACCELERATORS.values()}
    for (shape, accelerator, bits), cost in costs.items():
        for kind, pj in cost.items():
            totals[accelerator][bits][kind] += shapes[shape] * pj  # type: ignore[assignment]
    return {
        label: Energy(
            assumptions,
            {},
            SOURCE,
            {bits: _between(totals[accelerator], bits) for bits in WIDTHS},
        )
        for label, accelerator in ACCELERATORS.items()
    }


def _between(ends: dict[int, Counter[str]], bits: int) -> dict[str, float]:
    share = (bits - 1) / 7
    return {kind: share * ends[8][kind] + (1 - share) * ends[1][kind] for kind in ends[8]}


def layer_shapes(
    model: nn.Module, names: set[str], size: tuple[int, ...]
) -> list[tuple[str, LayerShape]]:
    """Return names and shapes of the 2-d convolutions and linear layers among `names`.

    They are in the order of their calls. A layer that is called twice is listed twice.

    Raises:
        UserError: the network does not run on an image of this size.
    """
    found: list[tuple[str, LayerShape]] = []

    def note(name: str, module: nn.Module, out: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            (rows, columns), groups = out.shape[-2:], module.groups
            channels = (module.out_channels // groups, module.in_channels // groups)
            kernel, stride = _pair(module.kernel_size), _pair(module.stride)
            found.append((name, LayerShape(groups, *channels, rows, columns, kernel, stride)))
        elif isinstance(module, nn.Linear):
            tokens = out.numel() // module.out_features
            sizes = (module.out_features, module.in_features, 1, tokens)
            found.append((name, LayerShape(1, *sizes, (1, 1), (1, 1))))

    handles = [
        module.register_forward_hook(lambda m, _, out, name=name: note(name, m, out))
        for name, module in model.named_modules()
        if name in names
    ]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size, device=device))
    except Exception as error:  # the network may be the user's: it may raise anything
        reason = message_of(error, 100)
        raise UserError(
            f"--energy needs a network of images: this one does not run on an image of {size} "
            f"({reason}); omit --energy"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]
