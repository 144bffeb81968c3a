"""The inspect record: bytes and energy of a model under a policy, computed without running it."""

import uuid
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.provenance import git_state, package_versions
from tq_lightning.records import InspectRecord, Layer, Mechanism

MECHANISM_BITS = (1, 2, 3, 4)
GRID = 1024  # values of u in (0, 1), at cell centers so that none is on the edge of a bin


def inspect_record(
    values: dict[str, Any],
    command: str = "",
    inference: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> InspectRecord:
    """Compute the inspect record of a model under a quantization policy.

    Args:
        values: name, num_classes, model_args, skip, widths, max_bits, norm, normalizer,
            activations and, optionally, level and scale, as in the `model:` section of a
            configuration.
        command: the command line, for the record.
        inference: also simulate the energy of an inference, which takes minutes.
        progress: called with the number of finished simulations and of all.

    Raises:
        UserError: the model is unknown, or the policy is invalid for it.
    """
    from tq_lightning.cost.energy import energy_model
    from tq_lightning.cost.layer_bytes import layer_rows
    from tq_lightning.cost.size import (
        WAYS,
        float_over,
        meta_model,
        paper_rows,
        read_at,
        total,
    )
    from tq_lightning.quant.config import QuantConfig
    from tq_lightning.quant.prepare import apply_config

    choices = {field.name for field in fields(QuantConfig)}
    policy = {key: value for key, value in values.items() if key in choices}
    make = (values["name"], values["num_classes"])
    model = meta_model(*make, **(values["model_args"] or {}))
    try:
        apply_config(model, QuantConfig.from_mapping(policy))
        rows = dict.fromkeys(WAYS, layer_rows(model))
        rows["paper"] = paper_rows(meta_model(*make, **(values["model_args"] or {})))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"inspect {values['name']}: {error}") from error
    max_bits, own = policy["max_bits"], rows["packed"]
    ways = {way: total(rows[way], way, max_bits) for way in WAYS}
    by_layer = {way: {row.name: sum(WAYS[way](row, max_bits)) for row in rows[way]} for way in WAYS}
    record = InspectRecord(
        id=uuid.uuid4().hex,
        model=values["name"],
        parameters=sum(row.parameters for row in own),
        model_args={"num_classes": values["num_classes"], **(values["model_args"] or {})},
        policy=policy,
        versions=package_versions(("torch", "timm")),
        commit=git_state()[0],
        command=command,
        quantized_parameters=sum(row.codes for row in own),
        layers=[
            Layer(
                row.name,
                row.kind,
                list(row.shape),
                row.parameters,
                row.bits,
                {way: by_layer[way].get(row.name, 0) for way in WAYS},
            )
            for row in own
        ],
        ways=ways,
        read_at={bits: read_at(own, bits) for bits in range(1, max_bits + 1)},
        paper_ratio=float_over(rows["paper"], ways["paper"].total),
        policy_ratio=float_over(own, ways["packed"].total),
        # a lookup reads only a few rows of a table
        energy=energy_model(sum(row.codes for row in own if row.kind != "embedding"), max_bits),
        mechanism=mechanism(),
    )
    if inference:
        from tq_lightning.cost.energy_inference import inference_energy

        float_model = meta_model(*make, **(values["model_args"] or {}))
        size = (getattr(float_model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
        names = {row.name for row in own if row.codes}
        energies = inference_energy(float_model, names, tuple(size), progress)
        record = replace(record, inference=energies)
    return replace(record, accounting=_accounting(record))


def _accounting(record: InspectRecord) -> list[str]:
    """Describe the parts of each ratio in words; sizes in bytes."""
    paper, packed, one, codes, files = (
        record.ways[way] for way in ("paper", "packed", "float_master", "master8", "file_per_width")
    )
    floats = f"{4 * record.parameters:,} bytes"
    policy = f"norm {record.policy['norm']}; widths 1 to {record.policy['max_bits']}"
    return [
        f"accounting of the paper: {record.parameters:,} float parameters ({floats}) over "
        f"{paper.total:,} = {paper.weights:,} of 8-bit weights (every layer but the stem, with the "
        f"classifier) + {paper.float:,} of stem, biases and the rest in float + {paper.norms:,} of "
        "norms (8 sets of scale, shift, mean and variance per batch norm); no scales, no header: "
        f"{record.paper_ratio:.3f}x",
        f"this policy as packed (in float: {record.skipped}; {policy}): the same {floats} over "
        f"{packed.total:,} = {packed.weights:,} of weights + {packed.scales:,} of scales + "
        f"{packed.float:,} in float + {packed.norms:,} of norms, without the header of the file: "
        f"{record.policy_ratio:.3f}x",
        f"with one norm set on either side, statistics included: {one.total:,} in float over "
        f"{codes.total:,} with codes: {one.total / codes.total:.3f}x; a float master that serves "
        "several widths needs the other sets as well",
        f"one file per width: {files.total:,} bytes, {files.total / packed.total:.3f} times the "
        "packed file",
        *_embeddings(record),
    ]


def _embeddings(record: InspectRecord) -> list[str]:
    """Return a note on the embedding tables and their share, quantized or not, if there are any."""
    tables = [layer for layer in record.layers if layer.kind == "embedding"]
    if not tables:
        return []
    count, stored = (
        sum(layer.parameters for layer in tables),
        sum(rows["packed"] for rows in (layer.bytes for layer in tables)),
    )
    kept = [layer.name for layer in tables if layer.bits is None]
    how = "quantized" if not kept else f"in float: {', '.join(kept)}"
    return [
        f"embedding tables ({how}): {count:,} of {record.parameters:,} parameters, "
        f"{count / record.parameters:.1%}; {stored:,} bytes of the packed file, "
        f"{stored / record.ways['packed'].total:.1%}; the energy of switches and of weight traffic "
        "leaves them out, since a lookup reads a few rows"
    ]


def mechanism() -> Mechanism:
    """Compute the levels over u of round, of round at 8 bits then shifted, and of floor."""
    import torch

    from tq_lightning.quant.codes import (
        STORED_BITS,
        codes_to_levels,
        floor_codes,
        round_codes,
        truncate_codes,
    )

    u = (torch.arange(GRID) + 0.5) / GRID
    stored = round_codes(u, STORED_BITS)
    makers = {
        "round": lambda bits: round_codes(u, bits),
        "round_shifted": lambda bits: truncate_codes(stored, STORED_BITS, bits),
        "floor": lambda bits: floor_codes(u, bits),
    }
    lines = {
        name: {
            bits: [round(x, 6) for x in codes_to_levels(make(bits), bits).tolist()]
            for bits in MECHANISM_BITS
        }
        for name, make in makers.items()
    }
    return Mechanism(list(MECHANISM_BITS), u.tolist(), **lines)
