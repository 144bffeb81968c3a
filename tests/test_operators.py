"""The weights that operators multiply by are on the grid, for every kind of layer.

The weight of a layer that standardizes it lies there up to one affine map per output channel.
"""

import pytest
import timm.layers as tl
import torch
from fixtures.dispatch import CONVOLUTIONS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tq_lightning.quant.bit_width import bit_width
from tq_lightning.quant.codes import codes_to_levels, dequantize, floor_codes, truncate_codes
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.quantized_tensors import original, weight_quantizers

_WEIGHT_SECOND = CONVOLUTIONS | {F.linear, torch.conv1d, torch.conv2d, torch.conv3d}


class RecordWeights(TorchFunctionMode):
    """Record every weight that an operator was called with, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _WEIGHT_SECOND:
            self.weights.append(kwargs["weight"] if "weight" in kwargs else args[1])
        elif func is F.multi_head_attention_forward:
            apart = [kwargs.get(f"{part}_proj_weight") for part in "qkv"]
            self.weights += [w for w in (args[5], *apart, args[11]) if w is not None]
        elif getattr(func, "__name__", "") in ("lstm", "gru", "rnn_tanh"):
            self.weights += [w for w in args[2] if w.dim() == 2]
        return func(*args, **kwargs)


class TiedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class ReadsWeight(nn.Module):
    """Use the weight of a layer without calling its forward, like some attention of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.qkv.weight, bias=None)


class AttentionLayer(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x[..., : self.attn.kdim], x[..., : self.attn.vdim])[0]


class RecurrentLayer(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(12, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


IMAGE, ROWS = (2, 12, 8, 8), (2, 7, 12)
LAYERS = {  # name -> (constructor, input shape)
    "Conv1d": (lambda: nn.Conv1d(7, 6, 3), ROWS),
    "Conv2d": (lambda: nn.Conv2d(12, 8, 3), IMAGE),
    "Conv3d": (lambda: nn.Conv3d(2, 8, 3), (2, 2, 6, 6, 6)),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, groups=4), IMAGE),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12), IMAGE),
    "transposed": (lambda: nn.ConvTranspose2d(12, 8, 3, stride=2), IMAGE),
    "transposed grouped": (lambda: nn.ConvTranspose2d(12, 8, 3, groups=4), IMAGE),
    "Linear": (lambda: nn.Linear(12, 9), ROWS),
    "Conv2dSame": (lambda: tl.Conv2dSame(12, 8, 3, stride=2), IMAGE),
    "StdConv2d": (lambda: tl.StdConv2d(12, 8, 3), IMAGE),
    "StdConv2dSame": (lambda: tl.StdConv2dSame(12, 8, 3, stride=2), IMAGE),
    "ScaledStdConv2d": (lambda: tl.ScaledStdConv2d(12, 8, 3), IMAGE),
    "ScaledStdConv2dSame": (lambda: tl.ScaledStdConv2dSame(12, 8, 3, stride=2), IMAGE),
    "ConvNormAct": (lambda: tl.ConvNormAct(12, 8, 3), IMAGE),
    "MultiheadAttention": (AttentionLayer, ROWS),
    "MultiheadAttention, keys of another size": (lambda: AttentionLayer(kdim=10, vdim=9), ROWS),
    "tied": (TiedLayers, ROWS),
    "code that reads the weight": (ReadsWeight, ROWS),
    "LSTM": (lambda: RecurrentLayer(nn.LSTM), ROWS),
    "GRU": (lambda: RecurrentLayer(nn.GRU), ROWS),
}
STANDARDIZED = [name for name in LAYERS if "Std" in name]


def recorded_weights(
    name: str, bits: int | None, source: str, normalizer: str = "tanh", train: bool = False
):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    prepare(model, skip=(), normalizer=normalizer, verbose=False)
    caught = RecordWeights()
    with torch.set_grad_enabled(train), bit_width(model.train(train), bits, source), caught:
        model(torch.randn(shape))
    return model, caught.weights


def quantized_grids(model: nn.Module, bits: int) -> list[tuple[Tensor, Tensor]]:
    """Return (level, weight) of every quantized tensor, from the shifted 8-bit codes."""
    grids = []
    for weight in weight_quantizers(model):
        quantizer = weight.quantizer
        u, scale = quantizer.normalize(weight.original.detach())
        codes = truncate_codes(floor_codes(u, 8), 8, bits)
        grids.append((codes_to_levels(codes, bits), dequantize(codes, bits, scale)))
    return grids


@pytest.mark.parametrize("source", ["quantize", "truncate"])
@pytest.mark.parametrize("name", LAYERS)
def test_operators_receive_quantized_weights(name, source):
    for bits in (1, 2, 4, 8):
        model, weights = recorded_weights(name, bits, source)
        grids = quantized_grids(model, bits)
        assert len(weights) == len(grids) > 0
        for weight, (level, exact) in zip(weights, grids, strict=True):
            if name not in STANDARDIZED:
                assert torch.equal(weight, exact)
                assert weight.unique().numel() <= 2**bits
                continue
            for own, plain in zip(weight.flatten(1), level.flatten(1), strict=True):
                affine = torch.stack([plain, torch.ones_like(plain)], 1).double()
                fit = (
                    affine
                    @ torch.linalg.lstsq(affine, own.double()[:, None], driver="gelsd").solution
                )
                assert (fit[:, 0] - own).abs().max() <= 1e-5 * own.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_float_weights_are_not_on_the_grid(name):
    _, weights = recorded_weights(name, None, "quantize")
    assert all(weight.unique().numel() > 16 for weight in weights)


@pytest.mark.parametrize("name", ["Conv2d", "grouped", "transposed grouped", "Linear", "LSTM"])
def test_standardized_weights_are_on_the_grid_per_output_channel(name):
    model, weights = recorded_weights(name, 2, "truncate", "absmax_channel")
    for weight, (_, exact) in zip(weights, quantized_grids(model, 2), strict=True):
        assert torch.equal(weight, exact)


@pytest.mark.parametrize(
    "name", ["StdConv2d", "MultiheadAttention", "LSTM", "transposed grouped", "tied"]
)
def test_gradients_reach_the_float_weights(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    prepare(model, skip=(), verbose=False)
    with bit_width(model, 2):
        model(torch.randn(shape)).square().sum().backward()
    for weight in weight_quantizers(model):
        full_name, module, tensor = weight.name, weight.module, weight.tensor
        gradient = original(module, tensor).grad
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0, (
            full_name
        )


def test_fused_norm_keeps_its_activation_and_becomes_switchable():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), tl.BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 2, 3)
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    before = model(x)
    prepare(model, skip=(), verbose=False)
    with bit_width(model, None):
        assert torch.equal(model(x), before)
    model.train()
    with bit_width(model, 4):
        model(x)
    sets = model[1].sets
    assert not torch.equal(sets["4"].running_mean, sets["8"].running_mean)
    assert isinstance(sets["4"].act, nn.SiLU)
