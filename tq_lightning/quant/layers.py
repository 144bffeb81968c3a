"""TODO quant/layers.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

_LAYER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Layer:
    """A layer whose weights a quantizer can take: its name, the tensors it multiplies with, and why it is left out."""

    name: str
    module: nn.Module
    tensors: tuple[str, ...]
    skipped: str | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The parameters behind its tensors: several for one that is computed (weight_norm, in a skipped layer)."""
        found: list[nn.Parameter] = []
        for tensor in self.tensors:
            own = self.module._parameters.get(tensor)
            computed = [p for name, p in self.module.named_parameters() if tensor in name]
            found += computed if own is None else [own]
        return found


def _tensor_names(module: nn.Module) -> tuple[str, ...]:
    """The tensors a layer multiplies its input with; empty for layers that multiply with none."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):  # its out_proj is a Linear of its own
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if getattr(module, name) is not None)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return tuple(
            name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")
        )
    return ()


def _refusal(module: nn.Module, tensors: tuple[str, ...]) -> str | None:
    """Why the weights of a layer can't be put on the grid; None where they can."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its weight has no shape yet: run one batch through the model first"
    for tensor in tensors:
        weight = module._parameters.get(tensor)
        if parametrize.is_parametrized(module, tensor):
            return f"its {tensor} is parametrized already"
        if weight is None:
            return f"its {tensor} is no parameter (an old-style weight_norm or spectral_norm?)"
        if not weight.is_floating_point() or weight.layout != torch.strided:
            return f"its {tensor} is {weight.dtype}, {weight.layout}, not a dense float tensor"
    if not tensors and not isinstance(module, (nn.Embedding, nn.EmbeddingBag, *_LAYER_NORMS)):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2:
            return f"{type(module).__name__} multiplies with a weight of shape {tuple(weight.shape)} in a way unknown here"
    return None


def _configured(model: nn.Module, key: str, names: list[str]) -> list[str]:
    """Layer names that a timm model gives for its first convolution or its classifier, where it gives any."""
    config = getattr(model, "pretrained_cfg", None) or {}
    given = config.get(key) or ()
    given = (given,) if isinstance(given, str) else tuple(given)
    return [n for n in names if any(n == g or n.startswith(g + ".") for g in given)]


def select_layers(model: nn.Module, skip: Sequence[str] = ("first", "last")) -> list[Layer]:
    """Every layer with weights to quantize, in model order, each with the skip entry that leaves it in float, if any.

    Args:
        model: any module; parameters may be on the meta device.
        skip: "first" (the stem: timm's `first_conv`, else the first layer), "last" (timm's `classifier`, else the last
            layer) and name patterns of fnmatch such as "layer4.*" or "*.conv_dw".

    Raises:
        ValueError: a pattern that matches no layer; a layer that can't be treated, with the pattern to skip it.
    """
    named = [
        (name or "(root)", module, _tensor_names(module)) for name, module in model.named_modules()
    ]
    names = [name for name, _, tensors in named if tensors]
    refusals = {
        name: why
        for name, module, tensors in named
        if (why := _refusal(module, tensors)) is not None
    }
    reasons: dict[str, str] = {}
    if isinstance(skip, str):
        raise ValueError(f"skip must be a list of entries, got {skip!r}; pass [{skip!r}]")
    for entry in skip:
        if entry == "first":
            matched = _configured(model, "first_conv", names) or names[:1]
        elif entry == "last":
            headless = getattr(model, "num_classes", None) == 0
            matched = _configured(model, "classifier", names) or ([] if headless else names[-1:])
        else:
            matched = [name for name, _, _ in named if fnmatchcase(name, entry)]
            if not any(name in names or name in refusals for name in matched):
                inside = [n for n in names if any(n.startswith(f"{m}.") for m in matched)]
                examples = [f"{entry}.*"] if inside else names[1:4]
                raise ValueError(
                    f"skip pattern {entry!r} matches no layer with weights to quantize; pass 'first', 'last' or a pattern "
                    f"of names such as {', '.join(map(repr, examples))}"
                )
        for name in matched:
            reasons.setdefault(name, entry)
    layers = []
    for name, module, tensors in named:
        if name in refusals and name not in reasons:
            raise ValueError(
                f"can't quantize layer {name}: {refusals[name]}; leave it in float with skip '{name}'"
            )
        if tensors:
            layers.append(Layer(name, module, tensors, reasons.get(name)))
    return layers
