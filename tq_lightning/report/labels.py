"""Text that a report uses in several places: labels, units, sources and definitions."""

import re
from collections.abc import Sequence
from typing import Any

from tq_lightning.records import format_value

# Keys that the report adds to a configuration.
ACTIVATIONS_SOURCE = "model.activations_source"
CALIBRATION = "calibration"

# Default values, which labels omit.
USUAL: dict[str, Any] = {
    "model.level": "endpoint",
    "model.activations": None,
    ACTIVATIONS_SOURCE: "quantize",
    "model.normalizer": "tanh",
    "model.scale": "mean",
    "model.norm": "per_width",
    "model.widths": [8, 4, 2, 1],
    "model.task": "classification",
    "model.quantize_embeddings": False,
}
SPLIT_WORDS = {"test": "test split", "val": "validation split, best epoch"}
ENERGIES = {
    "refetch_float_pj": "switch: refetch float weights, requantize",
    "refetch_planes_pj": "switch: refetch bit planes",
    "shift_pj": "switch: shift in place",
    "traffic_float_pj": "inference: read float weights",
    "traffic_pj": "inference: read n-bit weights",
    "compute_pj": "multiplications",
    "weights_pj": "traffic of weights",
    "activations_pj": "traffic of activations",
}
PARTS = {"weights": "quantized weights", "float": "left in float", "norms": "norm layers"}
PARTS |= {"scales": "scales"}
METHOD = (
    "Intervals are 95 % t intervals over seeds (mean ± t·s/√n). An arm with one seed has no "
    "interval. Figures clip the intervals of accuracies to 0 and 100 %. Differences are paired by "
    "seed if both arms have the same seeds; otherwise their interval is Welch's. Intervals are not "
    "corrected for multiple comparisons."
)
DEFINITIONS = {
    "Arm": "one configuration, trained with one or more seeds.",
    "Quantized": "n-bit codes computed from the float weights.",
    "Truncated": "n-bit codes computed from the stored 8-bit codes by a right shift.",
    "QT gap": "top-1 quantized minus top-1 truncated, in percentage points.",
}
PERPLEXITY = {
    "Perplexity": "exponential of the mean cross-entropy of the labeled tokens; lower is better.",
    "QT gap (perplexity)": "perplexity truncated minus perplexity quantized.",
}
# Number of classes by data set name, for the chance accuracy of records without it.
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "imagenet": 1000, "svhn": 10, "mnist": 10}


def labels(arms: list[Any], left_out: set[str]) -> list[str]:
    """Label arms by model, data set and distinguishing non-default values, except `left_out`."""
    heads = [model_and_data(arm) for arm in arms]
    named, out = {*left_out, "model.name", "data.name"}, []
    for head, arm in zip(heads, arms, strict=True):
        siblings = [other.config for h, other in zip(heads, arms, strict=True) if h == head]
        usual = {**USUAL, "model.ste": arm["model.ste"] if arm.paired else ""}
        omitted = {key: format_value(value) for key, value in usual.items()}
        keys = sorted((varying(siblings) - named) & set(arm.config))
        extras = [_extra(k, arm[k]) for k in keys if format_value(arm[k]) != omitted.get(k)]
        out.append(" · ".join([head, *extras]))
    return out


def varying(configs: list[dict[str, Any]]) -> set[str]:
    """Return the keys whose values differ among `configs`."""
    keys = {key for config in configs for key in config}
    return {key for key in keys if len({format_value(config.get(key)) for config in configs}) > 1}


def _extra(key: str, value: Any) -> str:
    if key == "model.quantizer":
        return f"{format_value(value)} weights"
    if (key, value) == (ACTIVATIONS_SOURCE, "truncate"):
        return "activations truncated too"
    return format_setting(key, value)


def model_and_data(arm: Any) -> str:
    """Return the model and the data set of an arm: `resnet20_cifar · cifar10`."""
    return f"{format_value(arm['model.name'])} · {format_value(arm['data.name'])}"


def wrapped(label: str, width: int) -> str:
    """Wrap a label between its parts, in lines of about `width` characters."""
    lines = [""]
    for part in label.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        lines[-1:] = [longer] if len(longer) <= width or not lines[-1] else [lines[-1], part]
    return "\n".join(lines)


def energy_name(kind: str) -> str:
    """Return the label of a kind of energy."""
    return ENERGIES.get(kind, kind.removesuffix("_pj").replace("_", " "))


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: `1 seed`, `8 bits`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_range(values: Sequence[float], digits: int = 1) -> str:
    """Format the range of the values, or one value if both ends are printed alike."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def format_setting(key: str, value: Any) -> str:
    """Format a configuration key and its value: `lr=0.1`."""
    return f"{short_key(key)}={format_value(value)}"


def short_key(key: str) -> str:
    """Return a flat configuration key without `model.` or `trainer.`."""
    return re.sub(r"^(model|trainer)\.", "", key)


def slug(label: str) -> str:
    """Return a file name for a label: lower case, digits and underscores, at most 60 characters."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")[:60]


def unique(names: list[str]) -> list[str]:
    """Number repeated names: a, a -> a, a_2."""
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{n}_{count + 1}" if count else n for n, count in zip(names, counts, strict=True)]
