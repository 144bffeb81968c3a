"""prepare(): attaches weight quantizers, activation quantizers and per-width norms to any nn.Module, by name pattern."""

from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tq_lightning.quant.activation import ACTIVATIONS, ActivationQuantizer
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import check_bits
from tq_lightning.quant.layers import _LAYER_NORMS, Layer, select_layers
from tq_lightning.quant.switchable_norm import PerWidthNorm
from tq_lightning.quant.weight import WeightQuantizer, weight_quantizers

NORMS = ("per_width", "per_width_all", "shared")
_RELUS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


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


def check_widths(widths: Iterable[int], max_bits: int) -> tuple[int, ...]:
    """The trained widths, widest first.

    Raises:
        ValueError: `max_bits` not in 1..8, no widths, a width out of range, or one given twice.
    """
    check_bits(max_bits, "max_bits")
    given = list(widths)
    if not given or any(type(b) is not int or not 1 <= b <= max_bits for b in given):
        raise ValueError(
            f"widths must be whole numbers from 1 to max_bits={max_bits}, got {given!r}"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"widths must differ, got {given!r}")
    return tuple(sorted(given, reverse=True))


def _attach_weight(
    layer: Layer, width: Width, quantizer: str, ste: str, level: str, normalizer: str
) -> None:
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


def _replace(
    model: nn.Module, kinds: tuple[type, ...], make, report: dict[str, str], what: str
) -> None:  # type: ignore[no-untyped-def]
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


def attach_norms(
    model: nn.Module, norm: str, width: Width, only: Collection[int] | None = None
) -> dict[str, str]:
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
        raise ValueError(
            f"unknown activations {activations!r}; pass null or one of {', '.join(ACTIVATIONS)}"
        )
    if activations is not None and not any(
        isinstance(child, _RELUS) for m in model.modules() for child in m.children()
    ):
        raise ValueError(
            f"{type(model).__name__} has no ReLU, ReLU6 or Hardtanh module to put activations={activations!r} in; "
            "pass activations=null"
        )
    widths = check_widths(widths, max_bits)
    width = Width(max_bits, widths)
    layers = select_layers(model, skip)
    chosen = [layer for layer in layers if layer.skipped is None]
    if not chosen:
        raise ValueError(
            f"nothing left to quantize in {type(model).__name__} with skip={list(skip)!r}; skip less"
        )

    unique = {id(p): 0 if is_lazy(p) else p.numel() for p in model.parameters()}
    quantized = {id(p) for layer in chosen for p in layer.parameters()}
    weights = {id(p) for layer in layers for p in layer.parameters()}
    report = PrepareReport()
    report.share = sum(unique[i] for i in quantized) / sum(unique.values())
    report.weight_share = sum(unique[i] for i in quantized) / sum(unique[i] for i in weights)

    for layer in layers:
        shapes = ", ".join(
            "not known yet" if is_lazy(p) else str(tuple(p.shape)) for p in layer.parameters()
        )
        if layer.skipped is None:
            _attach_weight(layer, width, quantizer, ste, level, normalizer)
            report[layer.name] = f"weight {shapes}: {quantizer}, {normalizer}, {level}"
        else:
            report[layer.name] = f"weight {shapes}: float (skip {layer.skipped!r})"
    if activations is not None:
        _replace(
            model,
            _RELUS,
            lambda m: ActivationQuantizer(activations, width, ste),
            report,
            f"activation: {activations}",
        )
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
