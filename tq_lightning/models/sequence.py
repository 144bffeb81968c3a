"""Networks for time series: a 1-D CNN, an LSTM and a small transformer.

Each takes `x` (batch, channels, steps), padded with zeros, and `lengths` (batch,), and returns
logits (batch, classes). They are factories: `model.name: tq_lightning.models.sequence:cnn`.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _mask(x: Tensor, lengths: Tensor) -> Tensor:
    """Return a mask (batch, 1, steps): 1 at the steps of a series, 0 at its padding."""
    steps = torch.arange(x.shape[2], device=x.device)
    return (steps < lengths[:, None])[:, None].to(x.dtype)


def _mean(features: Tensor, mask: Tensor) -> Tensor:
    """Average over the valid steps: (batch, channels, steps) -> (batch, channels)."""
    return (features * mask).sum(2) / mask.sum(2)


class CNN(nn.Module):
    """Four convolutions with batch norms, mean over the steps, linear classifier."""

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        sizes = (channels, *[width] * 4)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, 5, padding=2, bias=False) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in self.convs)
        self.act = nn.ReLU()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        mask = _mask(x, lengths)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x))) * mask
        return self.fc(_mean(x, mask))


class LSTM(nn.Module):
    """Linear layer, bidirectional LSTM, mean over the steps, linear classifier."""

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embed = nn.Linear(channels, width)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(2 * width)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        out, _ = self.lstm(self.embed(x.transpose(1, 2)))
        return self.fc(self.norm(_mean(out.transpose(1, 2), _mask(x, lengths))))


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = mask[:, None].bool()  # (batch, 1, 1, steps)
        q, k, v = qkv
        seen = seen.expand(-1, -1, x.shape[1], -1)  # ONNX Runtime's Attention does not broadcast it
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Linear layer, learned positions, pre-norm blocks, mean over the steps, classifier."""

    def __init__(self, channels: int, num_classes: int, width: int, depth: int, steps: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embed = nn.Linear(channels, width)
        self.positions = nn.Parameter(torch.randn(steps, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        mask = _mask(x, lengths)
        h = self.embed(x.transpose(1, 2)) + self.positions[: x.shape[2]]
        for block in self.blocks:
            h = block(h, mask)
        return self.fc(_mean(self.norm(h).transpose(1, 2), mask))


def cnn(num_classes: int, channels: int = 12, width: int = 64) -> nn.Module:
    """Create a 1-D CNN."""
    return CNN(channels, num_classes, width)


def lstm(num_classes: int, channels: int = 12, width: int = 64) -> nn.Module:
    """Create an LSTM."""
    return LSTM(channels, num_classes, width)


def transformer(
    num_classes: int, channels: int = 12, width: int = 64, depth: int = 2, steps: int = 512
) -> nn.Module:
    """Create a transformer for series of up to `steps` steps."""
    return Transformer(channels, num_classes, width, depth, steps)
