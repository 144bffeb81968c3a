"""Integer mode: run the quantized layers of a prepared or packed model on uint8 x int8 kernels."""

from tq_lightning.quant.integer.model import IntegerModel, integer_layers, integer_model

__all__ = ["IntegerModel", "integer_layers", "integer_model"]
