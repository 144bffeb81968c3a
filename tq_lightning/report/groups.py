"""Which runs belong together: arms (a configuration without its seed and paths), settings (an arm without the compared
factor)."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tq_lightning.report.labels import (
    ACTIVATIONS_SOURCE,
    AUTO_STE,
    labels,
    short,
    slug,
    text,
    unique,
    varying,
)
from tq_lightning.report.runs import Run

# Keys that say where, how watched or on what a run ran, not what it was. model.num_classes follows from the data set: it is
# null, or the number where a run has gone on.
NOT_AN_ARM = re.compile(
    r"^(seed_everything|config|ckpt_path|verbose|weights_only|checkpoint_every_n_steps)$"
    r"|^trainer\.(default_root_dir|logger|callbacks|plugins|profiler|accelerator|enable_\w+|log_every_n_steps|barebones)(\.|$)"
    r"|^trainer\.model_registry$|^model\.(seed|compile|channels_last|num_classes)$"
    r"|^data\.(eval_batch_size|root|num_workers|workers|download|pin_memory|seed|device)$"
    r"|(^|\.)(run_name|save_dir|out|version|tags|project|group|notes|wandb|tensorboard|offline)(\.|$)"
)
START = "model.checkpoint_path"
LISTS = ("model.widths", "model.skip")
BUDGET = re.compile(
    r"^trainer\.((min|max)_(epochs|steps|time)|limit_(train|val|test)_batches|overfit_batches)$"
)
PATH_VALUE = re.compile(r"[/\\]|\.(ckpt|pth?|safetensors|npz|tar)$")
TRUNCATED = "_truncate"  # how a kind of activations ends that is truncated like the weights


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone, one run a seed, ascending."""

    config: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds, in the order of the runs."""
        return tuple(run.seed for run in self.runs)

    @property
    def trained(self) -> list[int]:
        """The widths that were trained, in bits, ascending (all in the record where the configuration does not say)."""
        return sorted(int(w) for w in self.config.get("model.widths") or []) or self.runs[0].widths

    @property
    def budget(self) -> str:
        """Epochs and steps really taken, in words; several where the seeds differ."""
        pairs = sorted({run.budget for run in self.runs}, key=str)
        return " or ".join(
            f"{epochs} epoch{'' if epochs == 1 else 's'} / {steps} steps" for epochs, steps in pairs
        )

    @property
    def start(self) -> str:
        """What training started from, in words."""
        return f"from trained weights ({self[START]})" if self[START] else "from scratch"

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)


@dataclass(frozen=True)
class ComparisonGroup:
    """Arms alike but for one compared factor: `arms` is a list of (value of the factor as shown, arm)."""

    factor: str
    label: str
    slug: str
    arms: tuple[tuple[str, Arm], ...]
    flags: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs of the setting."""
        return [run for _, arm in self.arms for run in arm.runs]

    def values(self, value: str) -> list[Arm]:
        """The arms whose factor has `value`, fewest words first."""
        return [arm for shown, arm in self.arms if shown == value or shown.startswith(f"{value}, ")]


def arm_config(run: Run) -> dict[str, Any]:
    """The run's flat configuration without seed, places and loggers; `ste: auto` resolved; paths reduced to their shape."""
    config = {
        k: v
        for k, v in run.config.items()
        if not NOT_AN_ARM.search(k) and not (k.startswith("trainer.") and v is None)
    }
    if config.get("model.ste", "auto") == "auto" and config.get("model.quantizer") in AUTO_STE:
        config["model.ste"] = AUTO_STE[config["model.quantizer"]]
    # How activations are coded and whether they are truncated are two choices: kept apart, each can be compared alone.
    # Float activations are never truncated, so that they are the reference of those that are quantized and not truncated.
    if "model.activations" in config:
        kind = config["model.activations"]
        truncated = isinstance(kind, str) and kind.endswith(TRUNCATED)
        config["model.activations"] = kind.removesuffix(TRUNCATED) if truncated else kind
        config[ACTIVATIONS_SOURCE] = "truncate" if truncated else "quantize"
    return {
        key: _shape(value) if key not in LISTS else _listed(value) for key, value in config.items()
    }


def _listed(value: Any) -> Any:
    """ "8,4,2,1", "[8, 4, 2, 1]" and [8, 4, 2, 1] are one value; so are two orders of it."""
    items = re.split(r"[\s,\[\]]+", value) if isinstance(value, str) else value
    return (
        sorted((str(i) for i in items if i != ""), key=lambda i: (-int(i) if i.isdigit() else 0, i))
        if items
        else value
    )


def _shape(value: Any) -> Any:
    """A path's last parts with '#' for numbers: float_s0/last.ckpt and float_s1/last.ckpt are one arm."""
    if isinstance(value, str) and PATH_VALUE.search(value):
        return re.sub(r"\d+", "#", "/".join(re.split(r"[/\\]", value)[-3:]))
    return value


def group(runs: Iterable[Run], left_out: list[tuple[str, str]]) -> list[Arm]:
    """Runs -> arms. Of runs with the same arm and seed the latest counts; the others go to `left_out`: no new evidence."""
    arms: dict[str, list[Run]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for run in runs:
        config = arm_config(run)
        key = _key(config)
        configs[key] = config
        arms.setdefault(key, []).append(run)
    out = []
    for key, members in arms.items():
        latest: dict[int | None, Run] = {}
        for run in sorted(members, key=lambda r: (r.record.started or "", r.id)):
            if (older := latest.get(run.seed)) is not None:
                left_out.append(
                    (
                        older.path,
                        f"same arm and seed {run.seed} as the later {run.path}: a repeat is no new evidence",
                    )
                )
            latest[run.seed] = run
        ordered = sorted(latest.values(), key=lambda r: (r.seed is None, r.seed or 0))
        out.append(Arm(configs[key], tuple(ordered)))
    return sorted(out, key=lambda arm: [_number_aware(str(arm[k])) for k in MAIN_KEYS])


MAIN_KEYS = (
    "data.name",
    "model.name",
    "model.quantizer",
    "model.ste",
    "model.level",
    "model.activations",
)


def _number_aware(text: str) -> list[Any]:
    """resnet8 before resnet20: digits compare as numbers."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
        if part
    ]


def _key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True, default=str)


def settings(
    arms: list[Arm],
    factor: str,
    ignore: Iterable[str] = (),
    along: Iterable[str] = (),
    wanted: Iterable[str] = (),
    least: int = 1,
) -> list[ComparisonGroup]:
    """Arms grouped by everything but `factor` (a flat key), the keys `along` (that change with it) and `ignore`.

    A group is split by its budget where each of its values has an arm under some one budget; else the arms stay together,
    and the unequal budget is flagged. Kept are groups in which the factor takes every value `wanted`, and `least` values.
    """
    out = {factor, *ignore, *along}
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(
            _key({k: v for k, v in arm.config.items() if k not in out and not BUDGET.match(k)}), []
        ).append(arm)
    kept = [members for members in groups.values() if _enough(members, factor, set(wanted), least)]
    split = [
        part
        for members in kept
        for part in _by_budget(members, factor)
        if _enough(part, factor, set(wanted), least)
    ]
    named = labels([part[0].config for part in split], out)
    slugs = unique([slug(label) for label in named])
    return [
        ComparisonGroup(
            factor,
            label,
            name,
            _named(part, factor, out - {factor} - set(along)),
            tuple(flags(part, factor)),
        )
        for part, label, name in zip(split, named, slugs, strict=True)
    ]


def _enough(part: list[Arm], factor: str, wanted: set[str], least: int) -> bool:
    values = {text(arm[factor]) for arm in part}
    return wanted <= values and len(values) >= least


def _by_budget(members: list[Arm], factor: str) -> list[list[Arm]]:
    values = {text(arm[factor]) for arm in members}
    parts: dict[str, list[Arm]] = {}
    for arm in members:
        parts.setdefault(_key({k: v for k, v in arm.config.items() if BUDGET.match(k)}), []).append(
            arm
        )
    whole = [part for part in parts.values() if {text(arm[factor]) for arm in part} == values]
    return list(parts.values()) if whole else [members]


def _named(part: list[Arm], factor: str, ignored: set[str]) -> tuple[tuple[str, Arm], ...]:
    """Each arm with the value of its factor; where two share it, what else tells them apart is added."""
    names = [text(arm[factor]) for arm in part]
    differing = [
        k
        for k in sorted({k for a in part for k in a.config})
        if k != factor and len({text(a[k]) for a in part}) > 1
    ]
    told = [k for k in differing if k in ignored or BUDGET.match(k)]
    long = [
        ", ".join([n, *(f"{short(k)}={text(a[k])}" for k in told)])
        for n, a in zip(names, part, strict=True)
    ]
    return tuple(
        (long[i] if names.count(n) > 1 else n, arm)
        for i, (n, arm) in enumerate(zip(names, part, strict=True))
    )


def flags(part: list[Arm], factor: str) -> list[str]:
    """What makes the arms of a comparison unequal, each a short sentence for the figure itself."""
    out = []
    budgets = {text(arm[factor]): arm.budget for arm in part}
    if len(set(budgets.values())) > 1 or any(" or " in b for b in budgets.values()):
        out.append(
            "UNEQUAL BUDGETS: "
            + "; ".join(f"{name} {budget}" for name, budget in budgets.items())
            + "."
        )
    seeds = {text(arm[factor]): arm.seeds for arm in part}
    if len(set(seeds.values())) > 1:
        out.append(
            "UNEQUAL SEEDS: "
            + "; ".join(f"{name} {_seed_list(s)}" for name, s in seeds.items())
            + "."
        )
    single = [name for name, s in seeds.items() if len(s) == 1]
    if single:
        out.append(f"ONE SEED ({', '.join(single)}): no interval.")
    return out


def _seed_list(seeds: tuple[int | None, ...]) -> str:
    return ",".join(str(s) for s in seeds)


def shown_extras(arms: list[Arm]) -> list[str]:
    """For each arm, the keys beyond the main ones that differ among the arms, as `key=value` words."""
    keys = sorted(varying([arm.config for arm in arms]) - set(MAIN_KEYS)) if arms else []
    return [
        ", ".join(f"{short(k)}={text(arm[k])}" for k in keys if k in arm.config) for arm in arms
    ]
