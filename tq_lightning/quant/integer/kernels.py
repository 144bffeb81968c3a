"""oneDNN kernels of PyTorch that multiply uint8 activations by int8 weights, on CPU."""

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tq_lightning.errors import message_of

_NEEDED = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")


@cache
def missing_kernels() -> str | None:
    """Return the reason why integer layers are not available, or None if they are.

    A small product is compared with exact integers, to detect builds whose kernels are registered
    but do not run.
    """
    if not torch.backends.mkldnn.is_available():
        return f"PyTorch {torch.__version__} was built without oneDNN"
    registered = {s.name for s in torch._C._jit_get_all_schemas()}
    lacking = [name for name in _NEEDED if f"onednn::{name}" not in registered]
    if lacking:
        return f"PyTorch {torch.__version__} has no onednn::{lacking[0]}"
    a = torch.arange(32, dtype=torch.uint8).view(2, 16)
    w = (torch.arange(48) % 7 - 3).to(torch.int8).view(3, 16)
    try:
        got = Linear(w, torch.ones(3), torch.zeros(3), a.shape, 1.0)(a, None)
    except (RuntimeError, TypeError) as error:
        return f"onednn::qlinear_pointwise does not run ({message_of(error, 80)})"
    if not torch.equal(got.long(), a.long() @ w.long().T):
        return "onednn::qlinear_pointwise returns wrong sums"
    return None


@cache
def sums_are_exact() -> bool:
    """Return True if uint8 x int8 products are added in 32 bits: VNNI on x86, or ARM.

    Other processors add pairs of products in 16 bits, which saturates. A product that would
    saturate is also computed, because `ONEDNN_MAX_CPU_ISA` can disable features of the processor.
    """
    if missing_kernels() is not None:
        return False
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    vnni = any(known.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    older = getattr(torch.cpu, "_is_vnni_supported", bool)()  # PyTorch without get_capabilities
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return bool(vnni or older or arm) and _saturating_product_is_exact()


def _saturating_product_is_exact() -> bool:
    a = torch.full((8, 64), 255, dtype=torch.uint8)
    w = torch.full((16, 64), 127, dtype=torch.int8)
    got = Linear(w, torch.ones(16), torch.zeros(16), a.shape, 1.0)(a, None)
    return bool((got == 255 * 127 * 64).all())


class Act(NamedTuple):
    """Activation that a kernel applies to its result.

    Attributes:
        name: name in oneDNN.
        args: its numeric arguments.
        algorithm: its variant.
        exact: the same function for a float tensor.
    """

    name: str
    args: tuple[float, ...]
    algorithm: str
    exact: Callable[[Tensor], Tensor]


NO_ACT = Act("none", (), "", lambda x: x)
RELU = Act("relu", (), "", torch.relu)
GELU = Act("gelu", (), "none", F.gelu)  # only in linear layers
GELU_TANH = Act("gelu", (), "tanh", lambda x: F.gelu(x, approximate="tanh"))
HARDSWISH = Act("hardswish", (), "", F.hardswish)
SILU = Act("swish", (), "", F.silu)


def kernel_act(module: nn.Module | None) -> Act | None:
    """Return the kernel form of an activation module, or None if kernels do not support it."""
    if isinstance(module, (nn.ReLU6, nn.Hardtanh)):  # ReLU6 is a Hardtanh
        low, high = float(module.min_val), float(module.max_val)
        return Act("hardtanh", (low, high), "", lambda x: x.clamp(low, high))
    if isinstance(module, nn.GELU):
        return GELU if module.approximate == "none" else GELU_TANH
    known: dict[type, Act] = {nn.ReLU: RELU, nn.Hardswish: HARDSWISH, nn.SiLU: SILU}
    return known.get(type(module))


class Requantization(NamedTuple):
    """Step and zero point of uint8 results."""

    step: float
    zero: int


class Conv2d:
    """Convolution with prepacked int8 weights.

    Args:
        weight: int8 (out, in / groups, kh, kw).
        gain: float32 (out,), weight per integer step of each output channel.
        bias: float32 (out,).
        shape: shape of the first input, for the layout of the weights.
        stride: (height, width).
        padding: (height, width), of code 0.
        dilation: (height, width).
        groups: groups.
        step: step of the activation codes; their zero point is 0.
    """

    def __init__(
        self,
        weight: Tensor,
        gain: Tensor,
        bias: Tensor,
        shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        step: float,
    ) -> None:
        self.gain, self.bias, self.step = gain, bias, step
        self.zeros = torch.zeros(len(gain), dtype=torch.int64)
        self.how = (list(stride), list(padding), list(dilation), groups)
        self.channels, self.window = len(weight), weight.shape[2:]
        self.weight = torch.ops.onednn.qconv_prepack(weight, gain, step, 0, *self.how, list(shape))

    def __call__(
        self,
        a: Tensor,
        out: Requantization | None,
        act: Act = NO_ACT,
        residual: Tensor | None = None,
        residual_step: float = 1.0,
    ) -> Tensor:
        """Convolve uint8 codes; add `residual`, which is overwritten, and apply `act`.

        Returns:
            uint8 codes, or float32 without `out`.
        """
        dtype, step, zero = _output(out)
        head = (a, self.step, 0, self.weight, self.gain, self.zeros)
        middle = (self.bias, *self.how, step, zero, dtype)
        tail = (act.name, list(act.args), act.algorithm)
        if residual is None:
            return torch.ops.onednn.qconv2d_pointwise(*head, *middle, *tail)
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *head, residual, *middle, residual_step, 0, "sum", 1.0, *tail
        )

    def out_shape(self, a: Tensor) -> tuple[int, ...]:
        """Return the shape of the result for codes (batch, in, height, width)."""
        axes = zip(a.shape[2:], self.window, *self.how[:3], strict=True)
        pixels = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
        return len(a), self.channels, *pixels


class Linear:
    """Linear layer with prepacked int8 weights.

    Args:
        weight: int8 (out, in).
        gain: float32 (out,).
        bias: float32 (out,).
        shape: shape of the first input.
        step: step of the activation codes; their zero point is 0.
    """

    def __init__(
        self, weight: Tensor, gain: Tensor, bias: Tensor, shape: Sequence[int], step: float
    ) -> None:
        self.gain, self.bias, self.step = gain, bias, step
        self.zeros = torch.zeros(len(gain), dtype=torch.int64)
        rows = 1
        for n in shape[:-1]:
            rows *= n
        self.weight = torch.ops.onednn.qlinear_prepack(weight, [rows, shape[-1]])

    def __call__(
        self,
        a: Tensor,
        out: Requantization | None,
        act: Act = NO_ACT,
    ) -> Tensor:
        """Multiply uint8 codes (..., in); see `Conv2d.__call__`."""
        dtype, out_step, zero = _output(out)
        return torch.ops.onednn.qlinear_pointwise(
            a, self.step, 0, self.weight, self.gain, self.zeros, self.bias, out_step, zero, dtype,
            act.name, list(act.args), act.algorithm,
        )  # fmt: skip


def _output(out: Requantization | None) -> tuple[torch.dtype, float, int]:
    return (torch.float32, 1.0, 0) if out is None else (torch.uint8, out.step, out.zero)
