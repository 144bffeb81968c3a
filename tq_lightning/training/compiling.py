"""torch.compile of the network that a run trains: `model.compile`.

One graph serves all widths and sources (`quant.fused_weights`). The norm statistics of untrained
widths are estimated in eager mode (`quant.norm_calibration.calibrate_norms`).
"""

import os
import shutil
import sys

import torch
from torch import nn

from tq_lightning.errors import UserError

# modes of torch.compile
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # those that record CUDA graphs


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile can generate code for `device`.

    Raises:
        UserError: `device` is a CPU and no C++ compiler was found.
    """
    if device.type != "cpu":
        return
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as PyTorch
    if shutil.which(name) is None:
        raise UserError(
            f"model.compile: torch.compile needs a C++ compiler on a CPU, and {name} was not "
            "found; install it, set CXX to another one, or pass --model.compile false"
        )


def compiled(model: nn.Module, mode: str = "default") -> nn.Module:
    """Return the compiled `model`, which shares its parameters and compiles at the first call.

    Args:
        model: a prepared model.
        mode: one of `COMPILE_MODES`.
    """
    return torch.compile(model, mode=mode)  # type: ignore[return-value]
