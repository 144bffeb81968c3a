"""IntegerLayer: a quantized convolution or linear layer that runs on integers.

It reads uint8 activation codes and includes the operations that follow: the batch norm of the width
in use is folded into gain and bias, and the kernel adds a shortcut, applies an activation and
quantizes the result.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.integer.activations import ActivationCodes
from tq_lightning.quant.integer.exact import exact_codes, exact_value, finish
from tq_lightning.quant.integer.kernels import NO_ACT, Act, Conv2d
from tq_lightning.quant.integer.prepack import Prepacked, pad_input, prepack


class IntegerLayer(nn.Module):
    """Run a quantized layer and the operations that follow on integers. Shapes do not change.

    Args:
        name: name of the layer in the model.
        layer: `nn.Conv2d` or `nn.Linear` with quantized weights, without a `plan.reason_in_float`.
        width: the model's shared `Width`.
        into: codes of the input.
        norm: batch norm after the layer, per width or not.
        act: activation that the kernel applies; only `RELU` after a shortcut.
        out: codes of the output; None returns float32.
        residual: codes of a shortcut that is added after the norm; None if it is float32.
        exact_sums: see `saturation.activation_top`.
        exact: use exact weights at every width; see `arithmetic.integer_weight`. At 8 bits this may
            take a second kernel.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        width: Width,
        into: ActivationCodes,
        norm: nn.Module | None = None,
        act: Act = NO_ACT,
        out: ActivationCodes | None = None,
        residual: ActivationCodes | None = None,
        exact_sums: bool = True,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.layer, self.norm = layer, norm
        self.into, self.out, self.residual, self.act = into, out, residual, act
        self.exact_sums, self.exact = exact_sums, exact
        self.simulated = False  # set by the test oracle
        self._prepacked: Prepacked | None = None

    def __getstate__(self) -> dict[str, Any]:
        # prepacked weights can be neither copied nor pickled
        return {**self.__dict__, "_prepacked": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerLayer":
        self._prepacked = None
        return super()._apply(fn, recurse)

    def forward(self, a: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the layer to codes.

        Args:
            a: uint8 codes of `into`.
            residual: shortcut, uint8 codes if the output is uint8, else float32. Overwritten. If
                its shape differs from that of the output, it is added in float.

        Returns:
            uint8 codes of `out`, or float32.

        Raises:
            UserError: the model was moved off the CPU, or the input has another shape.
        """
        self.check_shape(a)
        prepacked = self.prepacked(a)
        if self.simulated:
            return finish(exact_value(self, a, residual), prepacked.out)
        inputs = pad_input(self.layer, a, prepacked.into.zero)
        if prepacked.second is not None or not _adds(prepacked, inputs, residual):
            return self.in_parts(prepacked, inputs, residual)
        if residual is None:
            y = prepacked.kernel(inputs, prepacked.requantize, self.act)
        else:
            assert isinstance(prepacked.kernel, Conv2d)
            y = prepacked.kernel(
                inputs, prepacked.requantize, self.act, residual, prepacked.residual_step
            )
        if prepacked.out is not None:
            if prepacked.out.make_top < 255:
                y.clamp_(max=prepacked.out.make_top)
            if prepacked.out.shift:
                y >>= prepacked.out.shift
        return y

    def in_parts(self, prepacked: Prepacked, inputs: Tensor, residual: Tensor | None) -> Tensor:
        """Add the products of two kernels whose integers sum to the weight, and the shortcut.

        They are k' and ones, whose product is the sum of the inputs, or, on processors that add
        products in 16 bits, the upper bits and the two lowest bits of the weight. There may be one
        kernel only, and the shortcut may be broadcast.
        """
        y = prepacked.kernel(inputs, None)
        if prepacked.second is not None:
            y.addcmul_(prepacked.second.kernel(inputs, None), prepacked.second.factor)
        if residual is not None:
            y = y.add(residual, alpha=prepacked.residual_step)
        return finish(exact_codes(self.act.exact(y), prepacked.out), prepacked.out)

    def check_width(self, bits: int | None) -> None:
        """Check that a width can be used; `bit_width` calls this.

        Raises:
            ValueError: float, which needs the float weights.
        """
        if bits is None:
            raise ValueError(
                f"integer mode has no float width; pass bits from 1 to {self.width.max_bits}"
            )

    def check_shape(self, a: Tensor) -> None:
        """Check the shape of the input: the kernels need a batch dimension.

        Raises:
            UserError: another number of dimensions or of channels.
        """
        layer, shape = self.layer, a.shape
        if isinstance(layer, nn.Conv2d):
            if len(shape) == 4 and shape[1] == layer.in_channels:
                return
            takes = f"(batch, {layer.in_channels}, height, width)"
        else:
            assert isinstance(layer, nn.Linear)
            if shape and shape[-1] == layer.in_features:
                return
            takes = f"(..., {layer.in_features})"
        raise UserError(
            f"layer {self.name} takes an input of shape {takes}, got {tuple(shape)}; pass a batch "
            "with the input size of the model"
        )

    def prepacked(self, a: Tensor) -> Prepacked:
        """Return the kernel of the width in use; build it if the width has changed.

        Raises:
            UserError: the input is not on the CPU.
        """
        key = (self.width.bits, self.width.source)
        if self._prepacked is None or self._prepacked.key != key:
            if a.device.type != "cpu":
                raise UserError(
                    f"integer mode runs on CPU, got a tensor on {a.device}; "
                    "load the model with mode='resident' for other devices"
                )
            self._prepacked = None  # free the kernel of the other width first
            with torch.inference_mode(False), torch.no_grad():
                self._prepacked = prepack(self, a)
        return self._prepacked

    def extra_repr(self) -> str:
        """Describe the operations of the kernel in the printed model."""
        parts = [self.act.name] if self.act != NO_ACT else []
        parts += ["sum"] if self.residual is not None else []
        return ", ".join([self.name, *parts, "float out" if self.out is None else "codes out"])


def _adds(prepacked: Prepacked, inputs: Tensor, residual: Tensor | None) -> bool:
    """Return True if the kernel can add the shortcut: one like its output, or none."""
    if residual is None:
        return True
    assert isinstance(prepacked.kernel, Conv2d)
    dtype = torch.float32 if prepacked.out is None else torch.uint8
    return residual.dtype == dtype and residual.shape == prepacked.kernel.out_shape(inputs)
