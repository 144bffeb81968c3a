"""prepare(): attaches quantizers and per-width norms to any nn.Module, by layer name."""

import warnings
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.layers import Layer, embedding_tables, replace_modules, select_layers
from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.prepare_report import PrepareReport
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import attach_norms, shared_norms
from tq_lightning.quant.weight import WeightQuantizer

_RELUS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


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
    float_pass: str = "plain",
    shared_norms: Sequence[str] = (),
    scale: str = "mean",
    quantize_embeddings: bool = False,
) -> PrepareReport:
    """Attach quantizers and per-width norms to `model`, in place. Load float weights first.

    The weights of convolutions, linear layers, attention projections and recurrent layers are
    parametrized. The model starts at its widest trained width. `bit_width` runs it at another
    width, or in float.

    Args:
        model: any module.
        quantizer: forward rule: "floor" (TruncQuant) or "round" (baseline), or another key of
            `codes.QUANTIZERS`.
        ste: backward rule, a key of `ste.STES`. "auto" is the paper's pairing: scaled for floor,
            identity for round.
        level: placement of codes in [0, 1]: "endpoint", "left" or "centre"; for non-uniform codes
            "centroid" or "native".
        normalizer: "tanh" (DoReFa), "absmax" or "learned" (a trained range) over the tensor;
            "tanh_channel", "absmax_channel" or "learned_channel" per output channel. "gaussian",
            "float_e2", "mu_law" and "log" give non-uniform codes. `normalizers.NORMALIZERS` lists
            the levels and scales that each supports.
        widths: trained widths, in bits.
        max_bits: stored width, 1..8.
        activations: None, or a key of `activation.ACTIVATIONS`. Replaces every ReLU, ReLU6 and
            Hardtanh.
        skip: layers that stay in float: "first", "last" and fnmatch patterns of layer names.
        norm: "per_width" (one batch norm per width), "per_width_all" (layer, group and RMS norms
            too) or "shared".
        verbose: print the report.
        float_pass: the network at bits=None: "plain" has the float weights, "normalized" has the
            normalized weights E (2u - 1), which are not quantized, and plain ReLUs.
        shared_norms: fnmatch patterns of norms that all widths share.
        scale: weight at level 1: "mean" is mean|w| (the paper), "span" the largest weight that the
            normalizer represents, so that weights keep their values.
        quantize_embeddings: quantize embedding tables too. "first" and "last" of `skip` never
            select a table.

    Returns:
        A dict from layer name to a description of the attached modules, with the share of quantized
        parameters. The arguments are stored as `model.tq`.

    Raises:
        ValueError: a choice is unknown or unsupported, the model is already prepared, a layer
            cannot be quantized, or the model has no layer to quantize.

    Source:
        TruncQuant, arXiv 2506.11431; per-width norms: Any-Precision DNNs, arXiv 1911.07346.
    """
    config = QuantConfig(
        quantizer,
        ste,
        level,
        normalizer,
        widths,  # type: ignore[arg-type]
        max_bits,
        activations,
        skip,  # type: ignore[arg-type]
        norm,
        float_pass,
        shared_norms,  # type: ignore[arg-type]
        scale,
        quantize_embeddings,
    )
    report = apply_config(model, config)
    if verbose:
        print(report)
    return report


def apply_config(model: nn.Module, config: QuantConfig) -> PrepareReport:
    """Prepare `model` with `config`; see `prepare`, which builds the configuration.

    Raises:
        ValueError: the model is already prepared, has no activation to replace or no layer to
            quantize, or a pattern matches nothing.
    """
    if weight_quantizers(model):
        raise ValueError("the model is already prepared; pass a new model")
    if config.activations is not None and not any(
        isinstance(child, _RELUS) for m in model.modules() for child in m.children()
    ):
        raise ValueError(
            f"{type(model).__name__} has no ReLU, ReLU6 or Hardtanh module to replace with "
            f"activations={config.activations!r}; pass activations=null"
        )
    layers = select_layers(model, config.skip, config.quantize_embeddings)
    if all(layer.skipped is not None for layer in layers):
        raise ValueError(
            f"nothing left to quantize in {type(model).__name__} with skip={list(config.skip)!r}; "
            "skip fewer layers"
        )
    shared_norms(
        model, config.norm, config.shared_norms
    )  # raises for a bad pattern before any change
    width = Width(config.max_bits, config.widths, bits=config.widths[0])
    # before any change too: the start of a learned range checks the weight
    quantizers = {
        layer.name: _weight_quantizers(layer, width, config)
        for layer in layers
        if layer.skipped is None
    }
    report = PrepareReport()
    report.set_shares(model, layers)
    for layer in layers:
        shapes = ", ".join(
            "not known yet" if is_lazy(p) else str(tuple(p.shape)) for p in layer.parameters()
        )
        if layer.skipped is None:
            _attach_weight(layer, quantizers[layer.name])
            rule = f"{config.quantizer}, {config.normalizer}, {config.level}"
            if config.scale != "mean":
                rule += f", {config.scale}"
        else:
            rule = f"float (skip {layer.skipped!r})"
        report[layer.name] = f"weight {shapes}: {rule}"
    for name, table in embedding_tables(model).items():
        if name not in report:
            report[name] = f"embedding {tuple(table.weight.shape)}: float"  # type: ignore[arg-type]
    if config.activations is not None:
        kind, ste, float_relu = config.activations, config.ste, config.float_pass == "normalized"
        replaced = replace_modules(
            model, _RELUS, lambda m: ActivationQuantizer(kind, width, ste, float_relu)
        )
        report.update(dict.fromkeys(replaced, f"activation: {kind}"))
    report.update(attach_norms(model, config.norm, width, shared=config.shared_norms))
    model.tq = config.to_dict()  # type: ignore[assignment]
    return report


def _weight_quantizers(
    layer: Layer, width: Width, config: QuantConfig
) -> dict[str, WeightQuantizer]:
    """Create the quantizers of a layer, by tensor."""
    transposed = isinstance(layer.module, _ConvTransposeNd)
    made = {}
    for tensor in layer.tensors:
        quantizer = made[tensor] = WeightQuantizer(
            f"{layer.name}.{tensor}",
            width,
            config,
            channel_dim=1 if transposed else 0,
            groups=layer.module.groups if transposed else 1,  # type: ignore[arg-type]
        )
        if NORMALIZERS[config.normalizer].reference == "learned":
            quantizer.start_range(getattr(layer.module, tensor))
    return made


def _attach_weight(layer: Layer, quantizers: Mapping[str, WeightQuantizer]) -> None:
    for tensor, quantizer in quantizers.items():
        # unsafe skips a check that would run the quantizer once
        parametrize.register_parametrization(layer.module, tensor, quantizer, unsafe=True)
    if isinstance(layer.module, nn.RNNBase):
        layer.module.register_forward_hook(_release_graph)
        # cuDNN would move the weights of a width to its own memory, away from the fused ones
        layer.module.__dict__["flatten_parameters"] = _do_not_flatten
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")


def _do_not_flatten() -> None:
    """Replace `RNNBase.flatten_parameters`: quantized weights change with every width."""


def _release_graph(rnn: nn.RNNBase, args: object, output: object) -> None:
    # An RNN keeps the weights of its last call. Here they are results of a graph, which would stay
    # alive and prevent a deep copy.
    rnn._flat_weights = [w if w is None or w.is_leaf else w.detach() for w in rnn._flat_weights]
