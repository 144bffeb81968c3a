"""A network small enough to run at every width in milliseconds."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.switchable_norm import per_width_norms


def build_network() -> nn.Sequential:
    """Build stem, bn1, act1, conv, bn2, act2, pool, flatten, fc with non-default norms."""
    torch.manual_seed(0)
    layers = OrderedDict(
        stem=nn.Conv2d(3, 6, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(6),
        act1=nn.ReLU(inplace=True),
        conv=nn.Conv2d(6, 6, 3, padding=1),
        bn2=nn.BatchNorm2d(6),
        act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(6, 5),
    )
    net = nn.Sequential(layers)
    for bn in (net.bn1, net.bn2):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.uniform_(bn.running_mean, -0.1, 0.1)
    return net


@pytest.fixture
def net() -> nn.Sequential:
    return build_network()


@pytest.fixture
def images() -> torch.Tensor:
    """Return fixed images (4, 3, 6, 6)."""
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(net: nn.Sequential) -> nn.Sequential:
    """Prepare the network for 8, 4 and 2 bits. Each has its own norm statistics."""
    prepare(net, skip=(), widths=(8, 4, 2), verbose=False)
    for norm in per_width_norms(net):
        for i, key in enumerate(norm.sets):
            norm.sets[key].weight.data.add_(0.1 * i)
            norm.sets[key].running_mean.add_(0.05 * i)
    return net.eval()
