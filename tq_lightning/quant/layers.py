"""Select the layers of a model to quantize, and replace modules."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

LAYER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies its input by weights, or an embedding table.

    Attributes:
        name: full name in the model, "(root)" for the model itself.
        module: the layer.
        tensors: names of the weights in it.
        skipped: the skip entry that keeps it in float, or None.
    """

    name: str
    module: nn.Module
    tensors: tuple[str, ...]
    skipped: str | None = None

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters behind its tensors.

        A computed tensor has several (weight_norm, in a skipped layer).
        """
        found: list[nn.Parameter] = []
        for tensor in self.tensors:
            own = self.module._parameters.get(tensor)
            computed = [p for name, p in self.module.named_parameters() if tensor in name]
            found += computed if own is None else [own]
        return found


def _tensor_names(module: nn.Module, embeddings: bool) -> tuple[str, ...]:
    """Return the names of the weights of a layer that can be quantized; empty for others."""
    if isinstance(module, EMBEDDINGS):
        return ("weight",) if embeddings else ()
    if isinstance(module, (_ConvNd, nn.Linear)):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):  # out_proj is a separate Linear
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if getattr(module, name) is not None)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return tuple(
            name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")
        )
    return ()


def _unsupported_reason(module: nn.Module, tensors: tuple[str, ...]) -> str | None:
    """Return the reason why the weights of a layer cannot be quantized; None if they can."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its weight has no shape yet: run one batch through the model first"
    for tensor in tensors:
        weight = module._parameters.get(tensor)
        if parametrize.is_parametrized(module, tensor):
            return f"its {tensor} is already parametrized"
        if weight is None:
            return f"its {tensor} is not a parameter (old-style weight_norm or spectral_norm?)"
        if not weight.is_floating_point() or weight.layout != torch.strided:
            return f"its {tensor} is {weight.dtype}, {weight.layout}, not a dense float tensor"
        if not weight.numel():
            return f"its {tensor} of shape {tuple(weight.shape)} is empty"
    if tensors and isinstance(module, EMBEDDINGS):
        if module.max_norm is not None:
            return "its max_norm rescales the table in place"
        if module.sparse:
            return "its gradients are sparse; create it with sparse=False"
    if not tensors and not isinstance(module, (*EMBEDDINGS, *LAYER_NORMS)):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2:
            return (
                f"{type(module).__name__} has a weight of shape {tuple(weight.shape)}, "
                "but is not a supported kind of layer"
            )
    return None


def _configured(model: nn.Module, key: str, names: list[str]) -> list[str]:
    """Return the layers that a timm model lists as `first_conv` or `classifier`, if any."""
    config = getattr(model, "pretrained_cfg", None) or {}
    given = config.get(key) or ()
    given = (given,) if isinstance(given, str) else tuple(given)
    return [n for n in names if any(n == g or n.startswith(g + ".") for g in given)]


def select_layers(
    model: nn.Module, skip: Sequence[str] = ("first", "last"), embeddings: bool = False
) -> list[Layer]:
    """List the layers with weights to quantize, in model order, skipped ones included.

    Args:
        model: any module; its parameters may be on the meta device.
        skip: "first" (the stem: timm's `first_conv`, else the first layer), "last" (timm's
            `classifier`, else the last layer), and fnmatch patterns of layer names, such as
            "layer4.*" or "*.conv_dw". "first" and "last" are never embedding tables.
        embeddings: list embedding tables too.

    Raises:
        ValueError: a pattern matches no layer, or a layer cannot be quantized; the message
            names the pattern that skips it.
    """
    named = [
        (name or "(root)", module, _tensor_names(module, embeddings))
        for name, module in model.named_modules()
    ]
    listed = [name for name, _, tensors in named if tensors]
    names = [name for name, module, _ in named if name in listed and not is_embedding(module)]
    unsupported = {
        name: why
        for name, module, tensors in named
        if (why := _unsupported_reason(module, tensors)) is not None
    }
    reasons: dict[str, str] = {}
    for entry in skip:
        if entry == "first":
            matched = _configured(model, "first_conv", names) or names[:1]
        elif entry == "last":
            headless = getattr(model, "num_classes", None) == 0
            matched = _configured(model, "classifier", names) or ([] if headless else names[-1:])
        else:
            matched = [name for name, _, _ in named if fnmatchcase(name, entry)]
            if not any(name in listed or name in unsupported for name in matched):
                inside = [n for n in listed if any(n.startswith(f"{m}.") for m in matched)]
                examples = [f"{entry}.*"] if inside else names[1:4]
                raise ValueError(
                    f"skip pattern {entry!r} matches no layer with weights to quantize; "
                    "pass 'first', 'last' or a pattern of names such as "
                    f"{', '.join(map(repr, examples))}"
                )
        for name in matched:
            reasons.setdefault(name, entry)
    layers = []
    for name, module, tensors in named:
        if name in unsupported and name not in reasons:
            raise ValueError(
                f"cannot quantize layer {name}: {unsupported[name]}; "
                f"leave it in float with skip '{name}'"
            )
        if tensors:
            layers.append(Layer(name, module, tensors, reasons.get(name)))
    return layers


def is_embedding(module: nn.Module) -> bool:
    """Return True if a module is an embedding table."""
    return isinstance(module, EMBEDDINGS)


def embedding_tables(model: nn.Module) -> dict[str, nn.Module]:
    """Find the embedding tables of a model, quantized or not, by name."""
    return {name or "(root)": m for name, m in model.named_modules() if is_embedding(m)}


def replace_modules(
    model: nn.Module,
    kinds: type | tuple[type, ...],
    make: Callable[[Any], nn.Module],
    keep: Collection[nn.Module] = (),
) -> list[str]:
    """Replace every submodule of some types by make(submodule), except those in `keep`.

    A module that is used in several places is replaced by one new module.

    Returns:
        The names of all places, in model order.
    """
    made: dict[int, nn.Module] = {}
    names = []
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):
            if child is None or not isinstance(child, kinds) or child in keep:
                continue
            if id(child) not in made:
                made[id(child)] = make(child)
            parent._modules[child_name] = made[id(child)]
            names.append(f"{parent_name}.{child_name}" if parent_name else child_name)
    return names
