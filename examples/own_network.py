"""Your own network and data set, for `model.name` and `data.name`.

tq-lightning fit --model.name own_network:network --data.name own_network:data_sets \
    --trainer.max_epochs 3
"""

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Classify points of a plane. Any nn.Module will do."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm1 = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.norm2 = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, num_classes)

    def forward(self, points: Tensor) -> Tensor:
        """Return logits (batch, classes) of points (batch, 2)."""
        x = self.norm1(self.first(points)).relu()
        return self.last(self.norm2(self.second(x)).relu())


def network(num_classes: int, width: int = 32) -> nn.Module:
    """Return the network. Further arguments come from `model.model_args`."""
    return Network(num_classes, width)


class Rings:
    """Points in rings around the origin; the class is the number of the ring."""

    classes = ("inner", "middle", "outer")

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        radius = self.labels + 0.8 * torch.rand(count, generator=draw)
        angle = 6.2832 * torch.rand(count, generator=draw)
        self.points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """A dict with the arguments of the network and the labels; (points, label) works too."""
        return {"points": self.points[number], "labels": self.labels[number]}


def data_sets(count: int = 600) -> tuple[Rings, Rings]:
    """Return (train, test). Further arguments come from `data.data_args`."""
    return Rings(count, 0), Rings(count // 3, 1)
