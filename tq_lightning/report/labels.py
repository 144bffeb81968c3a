"""Words for settings and values: labels as short as they can be and still tell settings apart."""

import re
from typing import Any

SHORT = {"model.": "", "data.": "data.", "trainer.": ""}
ACTIVATIONS_SOURCE = "model.activations_source"  # ours, no key of the configuration
# `ste: auto` is the pairing of the paper.
AUTO_STE = {"floor": "scaled", "round": "identity"}

# Customary values, not worth a word in a label.
USUAL: dict[str, Any] = {
    "model.level": "endpoint",
    "model.activations": None,
    ACTIVATIONS_SOURCE: "quantize",
    "model.normalizer": "tanh",
    "model.norm": "per_width",
    "model.widths": [8, 4, 2, 1],
}


def labels(configs: list[dict[str, Any]], left_out: set[str]) -> list[str]:
    """Model and data always; besides, what differs between the settings of that model and data and is not customary."""
    kin: dict[str, list[dict[str, Any]]] = {}
    for config in configs:
        kin.setdefault(_head(config), []).append(config)
    differ = {
        head: varying(of) - left_out - {"model.name", "data.name"} for head, of in kin.items()
    }
    out = []
    for config in configs:
        usual = {**USUAL, "model.ste": AUTO_STE.get(config.get("model.quantizer", ""))}
        told = [k for k in sorted(differ[_head(config)]) if k in config]
        extra = [
            _extra(k, config[k])
            for k in told
            if k not in usual or text(config[k]) != text(usual[k])
        ]
        out.append(" · ".join([_head(config), *extra]))
    return out


def _head(config: dict[str, Any]) -> str:
    return f"{text(config.get('model.name'))} · {text(config.get('data.name'))}"


def varying(configs: list[dict[str, Any]]) -> set[str]:
    """Keys that do not have one value in all of `configs`."""
    first = {key: text(value) for key, value in configs[0].items()}
    return {k for c in configs for k in {*c, *first} if text(c.get(k)) != first.get(k, text(None))}


def _extra(key: str, value: Any) -> str:
    if key == "model.quantizer":
        return f"{text(value)} weights"
    return (
        "activations truncated too"
        if (key, value) == (ACTIVATIONS_SOURCE, "truncate")
        else f"{short(key)}={text(value)}"
    )


def wrapped(label: str, width: int) -> str:
    """A label on lines of about `width` characters, broken between its parts."""
    lines = [""]
    for part in label.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(longer) > width and lines[-1]:
            lines.append(part)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def bits_words(bits: int) -> str:
    """`1 bit`, `2 bits`."""
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(text(v) for v in value)
    return "none" if value is None else str(value)


def short(key: str) -> str:
    for prefix, short in SHORT.items():
        if key.startswith(prefix):
            return short + key.removeprefix(prefix)
    return key


def slug(text: str) -> str:
    """A file name of a label: lower case, digits and underscores, at most 60 characters."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60]


def unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out
