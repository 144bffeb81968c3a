"""The (width, source) pairs of an evaluation, their logits, and their metrics."""

from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.batches import call_model, overwrites_outputs
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.records import ACC1, PPL, Metric

Pass = tuple[int | None, str]
TOP = 5  # top-5 is omitted with fewer classes


def sources_agree(model: nn.Module, bits: int) -> bool:
    """Return True if quantize and truncate give the same network at `bits` by construction.

    This is the case if nothing is shifted, or if all codes that are shifted nest.
    """
    if bits == width_of(model).max_bits:
        return True
    shifted = {w.quantizer.quantizer for w in weight_quantizers(model)}
    shifted |= {
        m.quantizer for m in model.modules() if isinstance(m, ActivationQuantizer) and m.truncated
    }
    return all(QUANTIZERS[name].nested for name in shifted)


def evaluation_passes(model: nn.Module) -> list[Pass]:
    """Return the (width, source) pairs to evaluate, widest first, float last.

    Pairs that agree by construction run once, truncated.
    """
    passes: list[Pass] = []
    for bits in range(width_of(model).max_bits, 0, -1):
        passes.append((bits, "truncate"))
        if not sources_agree(model, bits):
            passes.append((bits, "quantize"))
    return [*passes, (None, "quantize")]


@torch.no_grad()
def evaluate_batch(model: nn.Module, inputs: Any, passes: list[Pass]) -> dict[Pass, Tensor]:
    """Return the logits (batch, classes) of one batch for every pass.

    The weights are normalized once for all passes, and inside `fused_weights(model)` once
    for all batches.
    """
    logits = {}
    with fused_weights(model) as fused, fused.held():
        for bits, source in passes:
            with fused.at(bits, source):
                out = call_model(model, inputs)
                logits[bits, source] = out.clone() if overwrites_outputs(model) else out
    return logits


def width_metrics(
    stage: str, accuracy: dict[Pass, float], max_bits: int, trained: tuple[int, ...]
) -> dict[str, float]:
    """Return top-1 in % of both sources for every width, and the QT gaps in percentage points.

    The keys are `stage`/acc1_quantize_w4 and so on.
    """
    metrics = _by_source(stage, ACC1, accuracy, max_bits)
    metrics[f"{stage}/acc1_truncate_mean"] = sum(accuracy[b, "truncate"] for b in trained) / len(
        trained
    )
    metrics[f"{stage}/acc1_float"] = accuracy[None, "quantize"]
    return metrics


def top5_metrics(
    stage: str, accuracy: dict[Pass, float], trained: tuple[int, ...]
) -> dict[str, float]:
    """Return top-5 in % of the truncated weights at every width, their mean, and float.

    The mean is over the trained widths.
    """
    truncated = {bits: value for (bits, source), value in accuracy.items() if source == "truncate"}
    metrics = {f"{stage}/acc5_truncate_w{bits}": value for bits, value in truncated.items()}
    metrics[f"{stage}/acc5_truncate_mean"] = sum(truncated[b] for b in trained) / len(trained)
    metrics[f"{stage}/acc5_float"] = accuracy[None, "quantize"]
    return metrics


def perplexity_metrics(
    stage: str, perplexity: dict[Pass, float], max_bits: int
) -> dict[str, float]:
    """Return the perplexity of both sources for every width, and the gaps between them.

    The keys are `stage`/ppl_quantize_w4 and so on. `stage`/ppl_gap_w4 is truncated minus quantized,
    positive if truncation increases the perplexity.
    """
    metrics = _by_source(stage, PPL, perplexity, max_bits)
    metrics[f"{stage}/ppl_float"] = perplexity[None, "quantize"]
    return metrics


def _by_source(
    stage: str, metric: Metric, values: dict[Pass, float], max_bits: int
) -> dict[str, float]:
    """Return a metric of both sources and their gap for every width.

    A pass that is missing equals the truncated one by construction.
    """
    metrics = {}
    for bits in range(max_bits, 0, -1):
        truncate = values[bits, "truncate"]
        quantize = values.get((bits, "quantize"), truncate)
        metrics[f"{stage}/{metric.key}_quantize_w{bits}"] = quantize
        metrics[f"{stage}/{metric.key}_truncate_w{bits}"] = truncate
        metrics[f"{stage}/{metric.gap_key}_w{bits}"] = metric.gap(quantize, truncate)
    return metrics


def hits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return two bool tensors (batch,): the label is the top-1 class, and among the top 5."""
    first = logits.argmax(1) == target
    likeliest = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    return first, (likeliest == target[:, None]).any(1)
