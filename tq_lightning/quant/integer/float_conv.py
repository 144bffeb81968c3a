"""FloatConv: a convolution that stays in float, such as the stem, with its batch norm folded."""

from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.integer.norms import act_of, folded_norm


class FloatConv(nn.Module):
    """Convolve in float and apply the batch norm of the width in use, in one operation.

    Args:
        layer: convolution, quantized or not.
        norm: batch norm after it that `folds`, per width or not.
        width: the model's shared `Width`.
    """

    def __init__(self, layer: nn.Conv2d, norm: nn.Module, width: Width) -> None:
        super().__init__()
        self.layer, self.norm, self.width = layer, norm, width
        self._built: tuple[Any, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "FloatConv":
        self._built = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (batch, in, height, width), float32."""
        key = (self.width.bits, self.width.source)
        if self._built is None or self._built[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._built = (key, *self.folded())
        y = self.layer._conv_forward(x, *self._built[1:])
        act = act_of(self.norm)
        return y if act is None else act(y)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias, float32, with the norm of the width in use."""
        weight, bias = self.layer.weight.detach(), self.layer.bias
        factor, shift = folded_norm(self.norm, len(weight))
        if bias is not None:
            shift = shift + bias.detach().double() * factor
        return (weight.double() * factor.view(-1, 1, 1, 1)).float(), shift.float()
