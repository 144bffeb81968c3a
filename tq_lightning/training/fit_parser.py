"""Parser of fit, validate, test and predict, and the preprocessing of `argv`."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ActionYesNo, Namespace, set_dumper, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from tq_lightning.errors import UserError, program_name
from tq_lightning.files import expand_path
from tq_lightning.training.yaml_file import parse_yaml, read_yaml
from tq_lightning.training.yaml_values import Loader, Text, dump, load

PARSER_MODE = "tq"
PATHS = (
    "trainer.default_root_dir",
    "data.root",
    "ckpt_path",
    "run_dir",
    "model.checkpoint_path",
    "model.teacher_checkpoint_path",
)
_SECTIONS = ("model", "data", "trainer")


set_loader(PARSER_MODE, load, exceptions=(yaml.YAMLError,))
set_dumper(PARSER_MODE, lambda value: dump(value))


class ConfigFile(ActionConfigFile):
    """Read --config through `yaml_file`, whose errors name the file and the line."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Check the file, then let jsonargparse read it."""
        text = str(values)
        if not text:
            raise UserError("config: got an empty path; pass a YAML file")
        if not text.lstrip().startswith("{"):
            path = expand_path(text)
            values = read_yaml(path, Loader)
            if not isinstance(values, dict):
                raise UserError(f"--config {path}: expected sections such as model: and data:")
            for section in _SECTIONS:
                value = values.get(section)
                if section in values and value is not None and not isinstance(value, dict):
                    raise UserError(
                        f"--config {path}: {section}: got {value!r}, expected keys with values"
                    )
            text = str(path)
            if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"):  # jsonargparse reads UTF-8
                text = dump(values, flow=True)
        super().__call__(parser, cfg, text, option_string)


def make_parser(**kwargs: Any) -> LightningArgumentParser:
    """Create the parser of a verb, or the top-level parser."""
    kwargs = {
        "parser_mode": PARSER_MODE,
        "exit_on_error": False,
        "allow_abbrev": False,
        "prog": program_name(),
        **kwargs,
    }
    parser = LightningArgumentParser(**kwargs)
    parser.add_argument(
        "-c", "--config", action=ConfigFile, help="YAML file; later files override earlier ones"
    )
    return parser


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add the options of a run that belong to no section."""
    parser.add_argument(
        "--checkpoint_every_n_steps",
        type=int,
        default=0,
        help="also write checkpoints/last.ckpt every N optimizer steps (0: only every epoch)",
    )
    parser.add_argument(
        "--run_dir",
        type=str | None,
        default=None,
        help="folder of this run (default: a new one under trainer.default_root_dir); with "
        "--ckpt_path auto, the first start creates it and later starts resume from it",
    )
    for flag, what in (
        ("wandb", "Weights & Biases (WANDB_MODE=offline works)"),
        ("tensorboard", "TensorBoard"),
    ):
        parser.add_argument(
            f"--{flag}",
            action=ActionYesNo,
            nargs="?",
            default=False,
            help=f"also log to {what}",
        )


def expand_paths(config: Namespace) -> None:
    """Expand `~` in the keys whose values are paths, in place.

    Raises:
        UserError: a path is empty, as an unset variable of a shell is.
    """
    for key in PATHS:
        if config[key] == "":
            raise UserError(f"{key}: got an empty path; pass a file or a folder")
        if config[key] is not None:
            config[key] = str(expand_path(config[key]))


def drop_append_options(parser: LightningArgumentParser) -> None:
    """Remove options such as `--model.widths+`: lists given as text can't be appended to."""
    for action in parser._actions:
        for option in list(action.option_strings):
            if re.fullmatch(r"--(model|data)\.\w+\+", option):
                action.option_strings = [o for o in action.option_strings if o != option]
                del parser._option_string_actions[option]


def preprocess_argv(argv: Sequence[str]) -> list[str]:
    """Return command-line arguments with quoted values as `Text` and the content of section files.

    Sweep engines pass `--model.lr='1e-3'` with YAML quotes, which are removed. A file that is
    passed as a section, `--model FILE`, is replaced by its content.

    Raises:
        UserError: a file that is passed as a section is not valid YAML, or has no keys.
    """
    processed: list[str] = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        option = argument.startswith("--") and bool(equals)
        text = _unquote(value if option else argument)
        if text is None:
            processed.append(argument)
        else:
            processed += [key, text] if option else [text]
    for i, (key, value) in enumerate(pairwise(processed)):
        if key.removeprefix("--") in _SECTIONS and _is_file(value):
            processed[i + 1] = _section(value)
    for i, argument in enumerate(processed):
        key, _, value = argument.partition("=")
        if key.startswith("--") and key[2:] in _SECTIONS and _is_file(value):
            processed[i] = f"{key}={_section(value)}"
    return processed


def _is_file(value: str) -> bool:
    try:
        return expand_path(value).is_file() if value else False
    except (OSError, ValueError):  # a mapping as text may be too long for a name
        return False


def _section(path: str) -> str:
    """Return the keys of a file as a mapping in one line."""
    values = read_yaml(expand_path(path), Loader)
    if not isinstance(values, dict):
        raise UserError(f"{path}: got {type(values).__name__}, expected keys with values")
    return dump(values, flow=True).strip()


def check_nulls(section: str, values: Any) -> None:
    """Check that no key that takes text was given null on the command line.

    Such a value arrives as plain text; text of a file or in quotes is `Text`.

    Raises:
        UserError: a null; the message names the key.
    """
    for key, value in values.items():
        if type(value) is str and value in ("null", "None"):
            raise UserError(f"{section}.{key}: got null, expected text")


def _unquote(value: str) -> Text | None:
    """Return the text of a quoted value; None if it is not quoted."""
    if len(value) < 2 or value[0] not in "'\"" or value[-1] != value[0]:
        return None
    try:
        text = parse_yaml(value, "the value", Loader)
    except UserError:
        return None
    # argparse would interpret a leading dash as an option
    return text if isinstance(text, Text) and not text.startswith("-") else None
