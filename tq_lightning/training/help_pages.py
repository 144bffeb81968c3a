"""Help of fit, validate, test and predict: one page of common options, and one per section."""

import shutil
import textwrap
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from tq_lightning.data.datasets import DATASETS
from tq_lightning.errors import UserError, did_you_mean, program_name
from tq_lightning.quant.activation import ACTIVATIONS
from tq_lightning.quant.codes import LEVELS, QUANTIZERS
from tq_lightning.quant.config import NORMS
from tq_lightning.quant.level_tables import LEVEL_TABLES
from tq_lightning.quant.normalizers import NORMALIZERS, SCALES
from tq_lightning.quant.ste import STES
from tq_lightning.training.validation import CHOICES

SECTIONS = ("model", "data", "trainer", "all")
_VERBS = {
    "fit": "Train a model jointly at several bit widths.",
    "validate": "Evaluate every bit width on the validation split.",
    "test": "Evaluate every bit width on the test split and add the result to record.json.",
    "predict": "Write the class probabilities of the test split to a CSV file.",
}
# (option, value, description); a value may be a list of choices
_Row = tuple[str, str | Sequence[str], str]
_FIT: list[_Row] = [
    ("checkpoint_every_n_steps", "N", "also write last.ckpt every N steps"),
    ("wandb, --tensorboard", "", "also log to Weights & Biases, TensorBoard"),
]
_MODEL: list[_Row] = [
    ("model.name", "NAME", "timm model, or resnet20_cifar, ..."),
    ("model.checkpoint_path", "FILE", "float weights to start from"),
    ("model.pretrained", "true", "start from timm's weights"),
    ("model.quantizer", list(QUANTIZERS), ""),
    ("model.widths", "LIST", "trained bit widths, e.g. 8,4,2,1"),
    ("model.ste", ["auto", *STES], ""),
    ("model.level", [*LEVELS, *LEVEL_TABLES], ""),
    ("model.normalizer", list(NORMALIZERS), ""),
    ("model.scale", SCALES, ""),
    ("model.activations", ["null", *ACTIVATIONS], ""),
    ("model.norm", NORMS, ""),
    ("model.teacher", CHOICES["teacher"], ""),
    ("model.opt", "NAME", "timm optimizer: sgd, adamw, ..."),
    ("model.lr", "RATE", "peak learning rate"),
    ("model.sched", CHOICES["sched"], ""),
]
_DATA: list[_Row] = [
    ("data.name", list(DATASETS), ""),
    ("data.root", "FOLDER", "folder of the data set"),
    ("data.batch_size", "N", "images per process and step"),
]
_TRAINER: list[_Row] = [
    ("trainer.max_epochs", "N", "or --trainer.max_steps N"),
    ("trainer.accelerator", ["auto", "cpu", "gpu"], ""),
    ("trainer.devices", "N", "processes"),
    ("trainer.precision", ["32-true", "bf16-mixed", "16-mixed"], ""),
    ("trainer.default_root_dir", "FOLDER", "parent of run folders (runs)"),
]


def wanted_page(verb: str, argv: Sequence[str]) -> str | None:
    """Return the SECTION of `--help [SECTION]`, "" without one, or None without `--help`.

    Raises:
        UserError: an unknown section.
    """
    for i, argument in enumerate(argv):
        if argument in ("-h", "--help") or argument.startswith("--help="):
            following = argument.partition("=")[2] or (argv[i + 1] if len(argv) > i + 1 else "")
            if not following or following.startswith("-"):
                return ""
            if following not in SECTIONS:
                hint = did_you_mean(following, SECTIONS)
                raise UserError(f"{verb} --help: pass {', '.join(SECTIONS)}, got {following}{hint}")
            return following
    return None


def page(verb: str, section: str, parser: LightningArgumentParser) -> str:
    """Return a help page.

    Args:
        verb: fit, validate, test or predict.
        section: one of `SECTIONS`, or "" for the common options.
        parser: the parser of the verb.
    """
    if section == "all":
        return parser.format_help().rstrip()
    if section:
        return f"{section} options of {parser.prog}:\n{_section(section, parser)}"
    checkpoint = "resume from last, best, or a .ckpt file" if verb == "fit" else "last, best, FILE"
    general: list[_Row] = [
        ("config", "FILE", "YAML with sections model, data, trainer"),
        ("ckpt_path", "CKPT", checkpoint),
        ("seed_everything", "N", "seed of the run (0)"),
        ("print_config", "", "print the resolved configuration and exit"),
        *(_FIT if verb == "fit" else []),
    ]
    command = f"{program_name()} {verb}"
    lines = [
        f"usage: {command} --config FILE [--KEY VALUE ...]",
        "",
        _VERBS[verb],
        "",
        *_rows("options:", general),
        *_rows("model:", _MODEL),
        *_rows("data:", _DATA),
        *_rows("trainer:", _TRAINER),
        "all options:",
        f"  {command} --help model | data | trainer | all",
    ]
    return "\n".join(lines)


def _section(section: str, parser: LightningArgumentParser) -> str:
    """Extract the options of a section from the full help text of the parser."""
    titles = [
        f"{group.title}:"
        for group in parser._action_groups
        if any(action.dest.startswith(f"{section}.") for action in group._group_actions)
    ]
    kept, inside = [], False
    for line in parser.format_help().splitlines():
        if line and not line.startswith(" "):
            inside = line in titles
        elif inside:
            kept.append(line)
    return "\n".join(kept).rstrip()


def _rows(title: str, rows: Sequence[_Row]) -> list[str]:
    """Format options, one per line if they fit, with their choices in braces."""
    width = min(79, shutil.get_terminal_size().columns - 1)
    lines = [title]
    for option, value, description in rows:
        shown = value if isinstance(value, str) else "{" + ", ".join(value) + "}"
        head = f"  --{option} {shown}".rstrip()
        text = f"{head:<35} {description}" if description else head
        lines += textwrap.wrap(text, max(width, 40), subsequent_indent=" " * 8)
    return lines
