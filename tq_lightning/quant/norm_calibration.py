"""Norm statistics of a width, estimated from a few batches.

`calibrate_norms` estimates the statistics of untrained widths. `reestimate_norms` replaces the
running averages of trained widths. At the start of a training they lag behind the weights: they
average over about 1 / momentum = 10 updates, during which the weights change considerably.
"""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tq_lightning.errors import UserError
from tq_lightning.quant.batches import call_model, first_tensor, list_batches, samples_of
from tq_lightning.quant.bit_width import bit_width, width_of
from tq_lightning.quant.eval_mode import eval_mode
from tq_lightning.quant.switchable_norm import (
    PerWidthNorm,
    per_width_norms,
    untrained_widths,
    width_name,
)

SETTLED = 200  # updates after which both estimates agree on the digits data set


@torch.no_grad()
def calibrate_norms(
    model: nn.Module, batches: Iterable[Any], widths: list[int | None] | None = None
) -> None:
    """Estimate the norm statistics of untrained widths from a few batches.

    Affine parameters are copied from the next wider trained width. Statistics are averaged over the
    batches, weighted by their number of images, with weights and activations quantized as in
    training. Pass augmented training batches, because the statistics of the trained widths come
    from such images.

    A smaller last batch is skipped, unless it is the only batch. A batch of one image is skipped if
    there are larger ones: it has no variance at a layer of one pixel, which is an error in PyTorch.
    Only the batch norms of the width being estimated are in training mode, so trained norms, modes,
    the width in use and all random states do not change.

    Args:
        model: a prepared model.
        batches: inputs on the model's device: tensors, tuples of arguments or mappings.
        widths: widths to estimate; None = every untrained width and float.

    Raises:
        ValueError: a width in `widths` is trained or has no norm, there are no batches, the
            network does not take them, one contains NaN or infinity, or the model is packed or not
            prepared.
    """
    if width_of(model).packed:
        raise ValueError(
            "a packed model has the statistics of its file; "
            "calibrate the prepared model before save_packed"
        )
    norms = per_width_norms(model)
    untrained = untrained_widths(model)
    widths = untrained if widths is None else widths
    for bits in widths:
        if bits not in untrained:
            trained = any(width_name(bits) in norm.trained for norm in norms)
            why = "was trained" if trained else "has no norm"
            raise ValueError(
                f"width {width_name(bits)} {why}; pass untrained widths, or None for all of them"
            )
    if not norms or not widths:
        return
    batches = _usable(model, batches)
    if not all(first_tensor(batch).isfinite().all() for batch in batches):
        raise UserError(
            "a batch to estimate norm statistics from contains NaN or infinity; check the images"
        )
    with eval_mode(model), _eager():
        for bits in widths:
            for norm in norms:
                norm.copy_affine_from_wider(bits)
                if bits is not None:
                    norm.calibrated[bits] = False  # until all batches have passed
            _estimate(model, norms, batches, bits)
            if bits is not None:
                for norm in norms:
                    norm.calibrated[bits] = True


def lagging_widths(model: nn.Module) -> list[int | None]:
    """List the trained widths whose running averages lag: fewer than `SETTLED` updates.

    Updates are counted from `prepare` on. The widest width comes first, None (float) last. The list
    is empty for a model without per-width batch norms.
    """
    norms = per_width_norms(model)
    untrained = untrained_widths(model)
    widths = [
        bits
        for bits in (*range(width_of(model).max_bits, 0, -1), None)
        if bits not in untrained and norms and _batch_norms(norms, bits)
    ]
    if not widths:
        return []
    # all batch norms of a width are updated together; one read from the device for all widths
    counts = torch.stack([_batch_norms(norms, bits)[0].num_batches_tracked for bits in widths])  # type: ignore[misc]
    return [bits for bits, count in zip(widths, counts.tolist(), strict=True) if count < SETTLED]


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Any], widths: list[int | None]) -> None:
    """Replace the running averages of trained widths by statistics of the current weights.

    This works like `calibrate_norms`, but keeps affine parameters and the counts of updates.

    Args:
        model: a prepared model.
        batches: inputs on the model's device: tensors, tuples of arguments or mappings.
        widths: trained widths, e.g. `lagging_widths(model)`.

    Raises:
        ValueError: there are no batches.
    """
    norms = per_width_norms(model)
    if not norms or not widths:
        return
    batches = _usable(model, batches)
    with eval_mode(model), _eager():
        for bits in widths:
            layers = _batch_norms(norms, bits)
            counts = [layer.num_batches_tracked.clone() for layer in layers]  # type: ignore[union-attr]
            _estimate(model, norms, batches, bits)
            for layer, count in zip(layers, counts, strict=True):
                layer.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def _usable(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    batches = list_batches(model, batches, "to estimate norm statistics from")
    if len(batches) > 1 and samples_of(batches[-1]) < max(map(samples_of, batches)):
        del batches[-1]
    return [batch for batch in batches if samples_of(batch) > 1] or batches


def _eager() -> AbstractContextManager[Any]:
    """Run compiled models in eager mode: a graph would be compiled for every momentum."""
    # without torch._dynamo nothing is compiled, and its import takes a second
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _batch_norms(norms: list[PerWidthNorm], bits: int | None) -> list[_BatchNorm]:
    """List the batch norms of a width that keep statistics."""
    return [
        m
        for norm in norms
        for m in norm.sets[width_name(bits)].modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
    ]


def _estimate(
    model: nn.Module, norms: list[PerWidthNorm], batches: list[Any], bits: int | None
) -> None:
    """Replace the statistics of a width. After an error, they are as before."""
    layers = _batch_norms(norms, bits)
    momenta = [layer.momentum for layer in layers]
    before = [[b.clone() for b in layer.buffers(recurse=False)] for layer in layers]
    try:
        for norm in norms:
            norm.calibrating = True
        for layer in layers:
            layer.reset_running_stats()
            layer.training = True
        images = 0
        with bit_width(model, bits, "quantize"):
            for batch in batches:
                size = samples_of(batch)
                images += size
                for layer in layers:
                    layer.momentum = size / images  # the running mean over all images so far
                call_model(model, batch)
    except BaseException:
        for layer, values in zip(layers, before, strict=True):
            for buffer, value in zip(layer.buffers(recurse=False), values, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum, layer.training = momentum, False
        for norm in norms:
            norm.calibrating = False
