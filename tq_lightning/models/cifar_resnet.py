"""CIFAR ResNets, registered with timm on import.

Both kinds have a 3x3 stem, three stages of 16/32/64 channels and no stem pooling:

- `resnet8_cifar`, `resnet20_cifar`, `resnet56_cifar`: post-activation with option-A shortcuts
  (every second pixel, missing channels zero), as in arXiv 1512.03385 section 4.2. The weights of
  akamaster/pytorch_resnet_cifar10 (BSD-2) load into them by `checkpoint_path`.
- `preresnet20_cifar` (`expansion=1`) and `preresnet20_cifar_x5`: the network of Any-Precision DNNs
  (arXiv 1911.07346). It is pre-activation, has a strided 1x1 convolution and a batch norm on the
  shortcut of each strided block, and no ReLU between the last norm and the pooling. The paper keeps
  stem, shortcuts and classifier in float: `skip=("first", "last", "*skip_conv")`.

Every ReLU is a separate module, so that an activation quantizer can replace it.
"""

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class _Block(nn.Module):
    """Two 3x3 convolutions, each with a norm; ReLU after the first and after the sum.

    Shapes: (b, in, h, w) -> (b, out, h / stride, w / stride).
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.missing = stride, out_chs - in_chs
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        before = self.missing // 2
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = (
            F.pad(shortcut, (0, 0, 0, 0, before, self.missing - before))
            if self.missing
            else shortcut
        )
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) + shortcut)


class _PreActBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice.

    The shortcut of a strided block starts after the first ReLU and has a projection.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.projects = stride != 1
        if self.projects:
            self.skip_conv = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False)
            self.skip_bn = nn.BatchNorm2d(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(x))
        shortcut = self.skip_bn(self.skip_conv(y)) if self.projects else x
        return self.conv2(self.act2(self.bn2(self.conv1(y)))) + shortcut


class _CifarNet(nn.Module):
    """Base class: three stages, average pooling, a linear classifier, and timm's methods.

    Args:
        widths: channels of the three stages.
        depth: blocks per stage.
        num_classes: outputs; 0 returns the pooled features.
        in_chans: channels of the input.
    """

    block: type[nn.Module]

    def __init__(
        self, widths: tuple[int, int, int], depth: int, num_classes: int, in_chans: int
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = widths[-1]
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.layer1 = self._stage(widths[0], widths[0], 1, depth)
        self.layer2 = self._stage(widths[0], widths[1], 2, depth)
        self.layer3 = self._stage(widths[1], widths[2], 2, depth)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)

    def _stage(self, in_chs: int, out_chs: int, stride: int, depth: int) -> nn.Sequential:
        rest = [self.block(out_chs, out_chs, 1) for _ in range(depth - 1)]
        return nn.Sequential(self.block(in_chs, out_chs, stride), *rest)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes removes it. timm's signature has `global_pool`."""
        self.num_classes = num_classes
        self.fc: nn.Module = (
            nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        )

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.global_pool(x).flatten(1)
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(_CifarNet):
    """Post-activation CIFAR ResNet with 6 depth + 2 layers.

    Shapes: (b, in_chans, 32, 32) -> (b, num_classes).
    """

    block = _Block

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__((16, 32, 64), depth, num_classes, in_chans)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map before pooling."""
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))


class CifarPreActResNet(_CifarNet):
    """Pre-activation CIFAR ResNet with 6 depth + 2 layers, every stage `expansion` times wider.

    Shapes: (b, in_chans, 32, 32) -> (b, num_classes).
    """

    block = _PreActBlock

    def __init__(
        self, depth: int, num_classes: int = 10, in_chans: int = 3, expansion: int = 1
    ) -> None:
        super().__init__(
            (16 * expansion, 32 * expansion, 64 * expansion), depth, num_classes, in_chans
        )
        self.bn = nn.BatchNorm2d(64 * expansion)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map before pooling."""
        return self.bn(self.layer3(self.layer2(self.layer1(self.conv1(x)))))


_CIFAR_CFG = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),  # the public weights use the ImageNet statistics
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "fc",
}
_CIFAR_NAMES = (
    "resnet8_cifar",
    "resnet20_cifar",
    "resnet56_cifar",
    "preresnet20_cifar",
    "preresnet20_cifar_x5",
)
default_cfgs = generate_default_cfgs(dict.fromkeys(_CIFAR_NAMES, _CIFAR_CFG))


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a CIFAR ResNet-8, for tests and demos."""
    return build_model_with_cfg(CifarResNet, "resnet8_cifar", pretrained, depth=1, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a CIFAR ResNet-20."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=3, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a CIFAR ResNet-56."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=9, **kwargs)


@register_model
def preresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create the pre-activation CIFAR ResNet-20 of Any-Precision DNNs."""
    return build_model_with_cfg(
        CifarPreActResNet, "preresnet20_cifar", pretrained, depth=3, **kwargs
    )


@register_model
def preresnet20_cifar_x5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create `preresnet20_cifar` with five times as many channels."""
    kwargs.setdefault("expansion", 5)
    return build_model_with_cfg(
        CifarPreActResNet, "preresnet20_cifar_x5", pretrained, depth=3, **kwargs
    )
