"""prepare(): attaches weight quantizers, activation quantizers and per-width norms to any nn.Module, by name pattern."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tq_lightning.quant.activation import ACTIVATIONS, ActivationQuantizer
from tq_lightning.quant.codes import check_bits
from tq_lightning.quant.norm import PerWidthNorm
from tq_lightning.quant.weight import WeightQuantizer, weight_quantizers
from tq_lightning.quant.width import Width

NORMS = ("per_width", "per_width_all", "shared")
_RELUS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
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


class PrepareReport(dict[str, str]):
    """{layer name: what was attached}; `share` is the quantized part of all parameters, `weight_share` that of the
    convolution and linear weights. Printed, it is a table, a line a layer."""

    share: float = 0.0
    weight_share: float = 0.0

    def __str__(self) -> str:
        wide = max((len(name) for name in self), default=0)
        lines = [f"{name:<{wide}}  {what}" for name, what in self.items()]
        lines.append(
            f"quantized: {100 * self.share:.1f} % of all parameters, "
            f"{100 * self.weight_share:.1f} % of the convolution and linear weights"
        )
        return "\n".join(lines)


def _tensor_names(module: nn.Module) -> tuple[str, ...]:
    """The tensors a layer multiplies its input with; empty for layers that multiply with none."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):  # its out_proj is a Linear of its own
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if getattr(module, name) is not None)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return tuple(name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_"))
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
    named = [(name or "(root)", module, _tensor_names(module)) for name, module in model.named_modules()]
    names = [name for name, _, tensors in named if tensors]
    refusals = {name: why for name, module, tensors in named if (why := _refusal(module, tensors)) is not None}
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
            raise ValueError(f"can't quantize layer {name}: {refusals[name]}; leave it in float with skip '{name}'")
        if tensors:
            layers.append(Layer(name, module, tensors, reasons.get(name)))
    return layers


def check_widths(widths: Iterable[int], max_bits: int) -> tuple[int, ...]:
    """The trained widths, widest first.

    Raises:
        ValueError: `max_bits` not in 1..8, no widths, a width out of range, or one given twice.
    """
    check_bits(max_bits, "max_bits")
    given = list(widths)
    if not given or any(type(b) is not int or not 1 <= b <= max_bits for b in given):
        raise ValueError(f"widths must be whole numbers from 1 to max_bits={max_bits}, got {given!r}")
    if len(set(given)) < len(given):
        raise ValueError(f"widths must differ, got {given!r}")
    return tuple(sorted(given, reverse=True))


def _attach_weight(layer: Layer, width: Width, quantizer: str, ste: str, level: str, normalizer: str) -> None:
    transposed = isinstance(layer.module, _ConvTransposeNd)
    for tensor in layer.tensors:
        rule = WeightQuantizer(
            f"{layer.name}.{tensor}",
            width,
            quantizer,
            ste,
            level,
            normalizer,
            channel_dim=1 if transposed else 0,
            groups=layer.module.groups if transposed else 1,  # type: ignore[arg-type]
        )
        # unsafe: the check would run the rule once, at float width, to learn nothing
        parametrize.register_parametrization(layer.module, tensor, rule, unsafe=True)
    if isinstance(layer.module, nn.RNNBase):
        layer.module.register_forward_hook(_release_graph)


def _release_graph(rnn: nn.RNNBase, args: object, output: object) -> None:
    # an RNN keeps the weights of its last call: here results of a graph, which would live on and forbid a deep copy
    rnn._flat_weights = [w if w is None or w.is_leaf else w.detach() for w in rnn._flat_weights]


def _replace(model: nn.Module, kinds: tuple[type, ...], make, report: dict[str, str], what: str) -> None:  # type: ignore[no-untyped-def]
    """Puts make(module) where a module of `kinds` stands, once for a module that is used in several places."""
    made: dict[int, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):
            if child is None or not isinstance(child, kinds):
                continue
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if id(child) not in made:
                made[id(child)] = make(child)
            parent._modules[child_name] = made[id(child)]
            report[name] = what


def attach_norms(model: nn.Module, norm: str, width: Width, only: Collection[int] | None = None) -> dict[str, str]:
    """Puts a `PerWidthNorm` where a norm of the kinds that `norm` speaks of stands, after everything else is attached.

    Args:
        model: a model with its quantizers attached.
        norm, width, only: as in `prepare` and `PerWidthNorm`.

    Returns:
        {layer name: what was attached}. ValueError: no such `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; pass one of {', '.join(NORMS)}")
    report: dict[str, str] = {}
    if norm != "shared":
        kinds = (_BatchNorm, *_LAYER_NORMS) if norm == "per_width_all" else (_BatchNorm,)
        what = f"norm per width: trained {', '.join(map(str, width.widths))}; the others estimated"
        _replace(model, kinds, lambda m: PerWidthNorm(m, width, only), report, what)
    return report


def prepare(
    model: nn.Module,
    quantizer: str = "floor",
    ste: str = "auto",
    level: str = "endpoint",
    normalizer: str = "tanh",
    widths: Sequence[int] = (8, 4, 2, 1),
    max_bits: int = 8,
    activations: str | None = None,
    skip: Sequence[str] = ("first", "last"),
    norm: str = "per_width",
    verbose: bool = True,
) -> PrepareReport:
    """Makes `model` ready for training at several widths, in place. Load its weights before.

    Args:
        model: any module. Its convolutions, linear layers, attention projections and recurrent weights are parametrized.
        quantizer: forward rule, a key of `codes.QUANTIZERS`.
        ste: backward rule, a key of `ste.STES`; "auto" = scaled for floor, identity for round, the paper's pairing.
        level: placement, a key of `codes.LEVELS`.
        normalizer: "tanh" (DoReFa), "absmax", over the tensor, or with "_channel" per output channel.
        widths: widths that will be trained.
        max_bits: stored width, 1..8.
        activations: None, or a key of `activation.ACTIVATIONS`; takes the place of every ReLU, ReLU6 and Hardtanh.
        skip: what stays in float, see `select_layers`.
        norm: "per_width" (batch norms get a set per width), "per_width_all" (layer, group and RMS norms too), "shared".
        verbose: print the report.

    Returns:
        {layer name: what was attached}, with the share of parameters quantized. The arguments are kept as `model.tq`.

    Raises:
        ValueError: an unknown choice, a model prepared before, a layer that can't be treated, nothing to quantize.
    """
    if weight_quantizers(model):
        raise ValueError("the model is prepared already; prepare a fresh one")
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; pass one of {', '.join(NORMS)}")
    if activations is not None and activations not in ACTIVATIONS:
        raise ValueError(f"unknown activations {activations!r}; pass null or one of {', '.join(ACTIVATIONS)}")
    if activations is not None and not any(isinstance(child, _RELUS) for m in model.modules() for child in m.children()):
        raise ValueError(
            f"{type(model).__name__} has no ReLU, ReLU6 or Hardtanh module to put activations={activations!r} in; "
            "pass activations=null"
        )
    widths = check_widths(widths, max_bits)
    width = Width(max_bits, widths)
    layers = select_layers(model, skip)
    chosen = [layer for layer in layers if layer.skipped is None]
    if not chosen:
        raise ValueError(f"nothing left to quantize in {type(model).__name__} with skip={list(skip)!r}; skip less")

    unique = {id(p): 0 if is_lazy(p) else p.numel() for p in model.parameters()}
    quantized = {id(p) for layer in chosen for p in layer.parameters()}
    weights = {id(p) for layer in layers for p in layer.parameters()}
    report = PrepareReport()
    report.share = sum(unique[i] for i in quantized) / sum(unique.values())
    report.weight_share = sum(unique[i] for i in quantized) / sum(unique[i] for i in weights)

    for layer in layers:
        shapes = ", ".join("not known yet" if is_lazy(p) else str(tuple(p.shape)) for p in layer.parameters())
        if layer.skipped is None:
            _attach_weight(layer, width, quantizer, ste, level, normalizer)
            report[layer.name] = f"weight {shapes}: {quantizer}, {normalizer}, {level}"
        else:
            report[layer.name] = f"weight {shapes}: float (skip {layer.skipped!r})"
    if activations is not None:
        _replace(model, _RELUS, lambda m: ActivationQuantizer(activations, width, ste), report, f"activation: {activations}")
    report.update(attach_norms(model, norm, width))
    model.tq = {  # type: ignore[assignment]
        "quantizer": quantizer,
        "ste": ste,
        "level": level,
        "normalizer": normalizer,
        "widths": list(widths),
        "max_bits": max_bits,
        "activations": activations,
        "skip": list(skip),
        "norm": norm,
    }
    if verbose:
        print(report)
    return report
