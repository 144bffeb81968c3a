"""Models: `timm.create_model` with errors a user can act on, and the CIFAR ResNets registered with timm.

Two kinds of CIFAR network, both with a 3x3 stem, three stages of 16/32/64 channels and no stem pooling:

- `resnet8_cifar`, `resnet20_cifar`, `resnet56_cifar`: post-activation, option-A shortcuts (every second pixel, missing
  channels zero), as in arXiv 1512.03385 section 4.2. The weights of akamaster/pytorch_resnet_cifar10 (BSD-2) load into
  them by `checkpoint_path`.
- `preresnet20_cifar` (`expansion=1`) and `preresnet20_cifar_x5`: the network of Any-Precision DNNs (arXiv 1911.07346),
  pre-activation, a strided 1x1 convolution and a batch norm on the shortcut of each narrowing block, and no ReLU
  between the last norm and the pooling. That paper leaves stem, shortcuts and classifier in float:
  `skip=("first", "last", "*skip_conv")`.

Every ReLU is a module of its own, so that an activation quantizer can take its place.
"""

import difflib
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from tq_lightning.errors import UserError

# What a checkpoint may wrap its tensors in, the averaged weights first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What training wrappers put before every name: DataParallel, our LightningModule, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")


class _Block(nn.Module):
    """Two 3x3 convolutions, each with its norm; ReLU after the first and after the sum.

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
        shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.missing - before)) if self.missing else shortcut
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) + shortcut)


class _PreActBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; a strided block projects its shortcut, which starts after the first ReLU."""

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
    """What both kinds share: three stages, average pooling, one linear classifier, and the methods timm's tools call.

    Args:
        widths: channels of the three stages.
        depth: blocks in a stage.
        num_classes: outputs; 0 for none (the pooled features are returned).
        in_chans: channels of the input.
    """

    block: type[nn.Module]

    def __init__(self, widths: tuple[int, int, int], depth: int, num_classes: int, in_chans: int) -> None:
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
        """Replaces the classifier by a new one; 0 classes removes it. `global_pool` is there for timm's signature."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.global_pool(x).flatten(1)
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(_CifarNet):
    """Post-activation CIFAR ResNet of 6 depth + 2 layers: (b, in_chans, 32, 32) -> (b, num_classes)."""

    block = _Block

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__((16, 32, 64), depth, num_classes, in_chans)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))


class CifarPreActResNet(_CifarNet):
    """Pre-activation CIFAR ResNet of 6 depth + 2 layers, every stage `expansion` times wider.

    Shapes: (b, in_chans, 32, 32) -> (b, num_classes).
    """

    block = _PreActBlock

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3, expansion: int = 1) -> None:
        super().__init__((16 * expansion, 32 * expansion, 64 * expansion), depth, num_classes, in_chans)
        self.bn = nn.BatchNorm2d(64 * expansion)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.bn(self.layer3(self.layer2(self.layer1(self.conv1(x)))))


_CIFAR_CFG = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),  # those of the public weights, which are ImageNet's
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "fc",
}
_CIFAR_NAMES = ("resnet8_cifar", "resnet20_cifar", "resnet56_cifar", "preresnet20_cifar", "preresnet20_cifar_x5")
default_cfgs = generate_default_cfgs(dict.fromkeys(_CIFAR_NAMES, _CIFAR_CFG))


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CifarResNet, "resnet8_cifar", pretrained, depth=1, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=3, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=9, **kwargs)


@register_model
def preresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CifarPreActResNet, "preresnet20_cifar", pretrained, depth=3, **kwargs)


@register_model
def preresnet20_cifar_x5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    kwargs.setdefault("expansion", 5)
    return build_model_with_cfg(CifarPreActResNet, "preresnet20_cifar_x5", pretrained, depth=3, **kwargs)


def create_model(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Any model of timm, or one of the CIFAR ResNets above, by name.

    Args:
        name: a name of `timm.list_models()`, with its tag if need be, or `hf-hub:...` / `local-dir:...`.
        num_classes: outputs of the classifier; None for the model's own number.
        pretrained: loads timm's weights for the model (from its cache, else over the network).
        checkpoint_path: weights to load, `.safetensors` or a `torch.save` file (read with `weights_only=True`): a plain
            state dict, a checkpoint of timm, or one of our own runs. Names and shapes must match.
        **kwargs: passed on to the model, `in_chans=1` for one.

    Returns:
        The model, in training mode, on the CPU (or on the device of an enclosing `torch.device(...)`).

    Raises:
        UserError: unknown name, argument or tag; weights that cannot be had, read, or loaded into the model.
    """
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
        raise UserError(f"unknown model {name!r}; {hint}")
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except Exception as error:  # timm raises whatever the model or the network stack does
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if pretrained:
            hint = "pass pretrained=false, or checkpoint_path=FILE with weights you have"
            raise UserError(f"cannot get the pretrained weights of {name} ({said}); {hint}") from error
        asked = {"num_classes": num_classes, **kwargs}
        given = ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)
        raise UserError(f"timm cannot make {name} with {given or 'no arguments'} ({said})") from error
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path, name)
    return model


def load_weights(model: nn.Module, path: str | Path, name: str = "the model") -> None:
    """Loads a checkpoint file into an unprepared model, in place; all names and shapes must match.

    Raises:
        UserError: no such file, not a file of tensors, or tensors that do not fit (said: which, with both shapes).
    """
    state = _rename(read_state_dict(path), model)
    own = model.state_dict()
    for key in sorted(state.keys() & own.keys()):
        if state[key].shape != own[key].shape:
            got, want = tuple(state[key].shape), tuple(own[key].shape)
            raise UserError(f"{path}: {key} is {got}, {name} has {want}; {_mismatch_hint(key, got, want, model)}")
    # A counter that older PyTorch did not save, and that moves no output.
    missing = sorted(key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    extra = sorted(state.keys() - own.keys())
    if missing or extra:
        lists = {"missing": missing, "unknown": extra}
        words = [f"{len(keys)} {what} ({', '.join(keys[:2])}, ...)" for what, keys in lists.items() if keys]
        raise UserError(f"{path} does not fit {name}: tensors {', '.join(words)}; pass the checkpoint of this model")
    model.load_state_dict(state, strict=False)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, out of whatever it wraps them in. No file runs code.

    Raises:
        UserError: no such file, or one that holds anything but tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; pass the path of a .safetensors, .pth, .th or .ckpt file")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} refused: no checkpoint, or one that holds more than tensors and plain values"
        ) from error
    except Exception as error:
        raise UserError(f"cannot read {path} as a checkpoint ({' '.join(str(error).split())[:120]})") from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict (a dict of tensors, plain or under one of {', '.join(_WRAPPERS)})")
    return content


def _rename(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names as the model has them: wrapper prefixes off, prepared tensors back to their place, `linear` to our `fc`."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if isinstance(model, _CifarNet):
        state = {f"fc.{key[7:]}" if key.startswith("linear.") else key: value for key, value in state.items()}
    return state


def _mismatch_hint(key: str, got: tuple[int, ...], want: tuple[int, ...], model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", {}) or {}
    if key.startswith(f"{cfg.get('classifier')}."):
        return f"pass num_classes={got[0]}"
    if key == f"{cfg.get('first_conv')}.weight" and len(got) == len(want) and got[1] != want[1]:
        return f"pass in_chans={got[1]}"
    return "pass the checkpoint of this model"
