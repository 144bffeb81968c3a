"""Arms: runs with equal configurations, except for the seed and keys that don't affect results."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tq_lightning.records import Metric
from tq_lightning.report import labels
from tq_lightning.report.runs import Run

# Keys that do not affect the result. model.num_classes is determined by the data set: it is null in
# a new run and a number in a resumed one.
NOT_AN_ARM = re.compile(
    r"^(seed_everything|config|ckpt_path|verbose|weights_only|checkpoint_every_n_steps)$"
    r"|^trainer\.(default_root_dir|logger|profiler|accelerator|enable_\w+)(\.|$)"
    r"|^trainer\.(log_every_n_steps|barebones|model_registry)(\.|$)"
    r"|^model\.(seed|compile|compile_mode|cuda_graph|channels_last|num_classes)$"
    r"|^data\.(eval_batch_size|num_workers|workers|download|pin_memory|device)$"
    r"|^(run_name|save_dir|out|version|tags|project|group|notes|wandb|tensorboard|offline)(\.|$)"
)
# callbacks that do not affect it either
PASSIVE = re.compile(r"\b(ReportToStudy|ModelCheckpoint|\w+Monitor|\w+Bar|\w*Summary)\b")
START = "model.checkpoint_path"
LISTS = ("model.widths", "model.skip", "model.shared_norms")
ADDED = {k: labels.USUAL[k] for k in ("model.scale", "model.quantize_embeddings", "model.task")}
BUDGET = re.compile(
    r"^trainer\.((min|max)_(epochs|steps|time)|limit_(train|val|test)_batches|overfit_batches)$"
)
TRUNCATED = "_truncate"  # suffix of activations that are truncated like the weights
# Keys that every table shows. Arms are sorted by them, in this order.
MAIN_KEYS: tuple[str, ...] = ("data.name", "model.name", "model.quantizer", "model.ste")
MAIN_KEYS += ("model.level", "model.activations")


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ only in their seed, one run per seed, in ascending order."""

    config: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> str:
        """The seeds, in the order of the runs: `0,1,2`."""
        return ",".join(str(run.seed) for run in self.runs)

    @property
    def metric(self) -> Metric:
        """Metric of the task of the runs."""
        return self.runs[0].metric

    @property
    def nested(self) -> bool:
        """True if shifting the quantizer's codes gives its own codes at the narrower width."""
        return self.runs[0].record.codes_nest

    @property
    def paired(self) -> bool:
        """True if the STE is the one that the paper pairs with the quantizer."""
        return any(run.record.ste_is_paired for run in self.runs)

    @property
    def widths(self) -> list[int]:
        """Recorded widths of the first run in bits, ascending."""
        return self.runs[0].widths

    @property
    def trained(self) -> list[int]:
        """Trained widths in bits, ascending; all recorded widths if none are configured."""
        return sorted(int(w) for w in self["model.widths"] or []) or self.widths

    @property
    def budget(self) -> str:
        """Epochs and steps taken; several if the seeds differ."""
        pairs = sorted({run.budget for run in self.runs}, key=str)
        return " or ".join(f"{labels.counted(e or 0, 'epoch')} / {s} steps" for e, s in pairs)

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)


def arm_config(run: Run) -> dict[str, Any]:
    """Return the flat configuration of a run without seed, paths and loggers.

    The STE is resolved, and file names are normalized. The calibration of the norm statistics is
    included if the record has it, and a setting that changed at a resume has all its values, so
    that no mean mixes different calibrations or settings.
    """
    changed = {k: v for k, v in run.record.changed.items() if not BUDGET.match(k)}
    config = {
        k: changed.get(k, v)
        for k, v in run.config.items()
        if not NOT_AN_ARM.search(k) and not (k.startswith(("trainer.", "data.")) and v is None)
    }
    if config.get("data.name") not in ("imagefolder", "wds"):  # the folder is the data set
        config.pop("data.root", None)
    if config.get("data.seed") == run.seed:
        config.pop("data.seed", None)
    acting = [c for c in _items(config.pop("trainer.callbacks", None)) if not PASSIVE.search(c)]
    if acting:  # as Name{arguments}
        head = re.compile(r"^\{'class_path': '(?:\w+\.)*(\w+)'(?:, 'init_args': )?(.*)\}$")
        config["trainer.callbacks"] = [head.sub(r"\1\2", c) for c in acting]
    found = {"model.ste": run.record.ste_used, labels.CALIBRATION: run.record.calibration}
    config |= {key: value for key, value in found.items() if value is not None}
    if "model.normalizer" in config:  # earlier versions did not record these keys
        config = {**ADDED, "model.shared_norms": [], **config}
    # Split activations into a quantizer and a source, so that each can be compared separately.
    # Float activations count as not truncated: they are the reference for quantized ones.
    if "model.activations" in config:
        kind = config["model.activations"]
        truncated = isinstance(kind, str) and kind.endswith(TRUNCATED)
        config["model.activations"] = kind.removesuffix(TRUNCATED) if truncated else kind
        config[labels.ACTIVATIONS_SOURCE] = "truncate" if truncated else "quantize"
    widths, weights = _items(config.get("model.widths")), _items(config.get("model.width_weights"))
    if len(weights) >= len(widths) > 0:  # the float pass comes first
        pairs = sorted(zip(widths, weights[-len(widths) :], strict=True), key=lambda p: -int(p[0]))
        config["model.width_weights"] = weights[: -len(widths)] + [weight for _, weight in pairs]
    for key in LISTS:
        if items := _items(config.get(key)):
            config[key] = sorted(items, key=lambda i: (-int(i) if i.isdecimal() else 0, i))
    for key in (START, "model.teacher_checkpoint_path"):
        if isinstance(config.get(key), str):  # numbers vary with the seed
            config[key] = re.sub(r"\d+", "#", "/".join(re.split(r"[/\\]", config[key])[-3:]))
    return config


def _items(value: Any) -> list[str]:
    """Return the items of "8,4,2,1", "(8, 4)", [8, 4] or 8 as text; whole numbers as integers."""
    items = re.split(r"[\s,\[\]()'\"]+", value) if isinstance(value, str) else value
    items = items if isinstance(items, list) else [] if items is None else [items]
    return [re.sub(r"^(\d+)\.0*$", r"\1", str(i)) for i in items if i not in ("", None)]


def group(runs: Iterable[Run], left_out: list[tuple[str, str]]) -> list[Arm]:
    """Group runs into arms. Keep the latest run of each seed; add the others to `left_out`."""
    members: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        config = arm_config(run)
        members.setdefault(key_of(config), (config, []))[1].append(run)
    out = []
    for config, same in members.values():
        same.sort(
            key=lambda run: (run.seed is None, run.seed or 0, run.record.started or "", run.id)
        )
        for older, run in pairwise(same):
            if older.seed == run.seed:
                reason = f"superseded by the later {run.path} with the same arm and seed {run.seed}"
                left_out.append((older.path, reason))
        out.append(Arm(config, tuple({run.seed: run for run in same}.values())))
    return sorted(out, key=lambda arm: [number_aware(str(arm[k])) for k in MAIN_KEYS])


def number_aware(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares digits as numbers: resnet8 before resnet20."""
    parts = filter(None, re.split(r"(\d+)", name))
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def key_of(config: dict[str, Any]) -> str:
    """Return a canonical string of a configuration."""
    return json.dumps(config, sort_keys=True, default=str)


def shown_extras(arms: list[Arm]) -> list[str]:
    """List, for each arm, the other keys that differ among the arms, as `key=value`."""
    keys = sorted(labels.varying([arm.config for arm in arms]) - set(MAIN_KEYS))
    return [", ".join(labels.format_setting(k, a[k]) for k in keys if k in a.config) for a in arms]
