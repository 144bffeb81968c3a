"""Rewrite errors of the command-line parser and of Lightning as one line with a remedy."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.errors import did_you_mean, program_name
from tq_lightning.training.module import TQModule

OPTIONS = ["config", "ckpt_path", "seed_everything", "checkpoint_every_n_steps", "run_dir"]
OPTIONS += ["wandb", "tensorboard", "print_config"]
_SECTIONS = {"model": TQModule, "data": TQDataModule, "trainer": Trainer}
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "{key: value}",
    "list": "a list",
    "NoneType": "null",
}


def known_keys() -> Iterator[str]:
    """Yield every key of the command line, without dashes."""
    yield from OPTIONS
    for section, owner in _SECTIONS.items():
        for key in inspect.signature(owner).parameters:
            yield f"{section}.{key}"


def rewrite_parser_error(error: BaseException) -> str:
    """Return the message of an error as one line, with a hint for an unknown key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    rewrites = (
        _unknown_argument,
        _unknown_key,
        _wrong_section,
        _wrong_list,
        _not_a_class,
        _wrong_class_argument,
        _wrong_type,
        _wrong_flag,
        _no_accelerator,
        _unknown_name,
        _not_logged,
        _same_callback,
    )
    for rewrite in rewrites:
        message = rewrite(text)
        if message is not None:
            return message
    return text[:600]


def _unknown_argument(text: str) -> str | None:
    """Rewrite "unrecognized arguments: ..." of argparse."""
    match = re.search(r"unrecognized arguments: (\S+)", text)
    if match is None:
        return None
    argument = match[1]
    if not argument.startswith("-"):
        if argument.endswith((".yaml", ".yml")) or Path(argument).is_file():
            return f"unknown argument {argument}; did you mean --config {argument}?"
        return f"unknown argument {argument}; options start with --, e.g. --model.lr 0.1"
    key = argument.split("=")[0].lstrip("-")
    return f"unknown option --{key}{_hint(key, '--')}"


def _unknown_key(text: str) -> str | None:
    """Rewrite jsonargparse's message on an unknown key of a configuration file."""
    match = re.search(
        r"(?:Subcommand '\w+' does not accept option|^Option) '([^']*)'(?: is not accepted)?", text
    )
    key = match[1] if match else ""
    group = re.search(r"Group '(\w+)' does not accept option '([^']*)'", text)
    if group is not None:
        key = f"{group[1]}.{group[2]}"
    return f"unknown key {key} in the configuration{_hint(key, '')}" if key else None


def _hint(key: str, dashes: str) -> str:
    if key.endswith("+"):
        return f"; appending to lists is not supported, pass the full list as {dashes}{key[:-1]}"
    # the same name in another section, or without its section
    leaf = key.rpartition(".")[2]
    same = [known for known in known_keys() if known.rpartition(".")[2] == leaf]
    if same:
        return f"; did you mean {', '.join(f'{dashes}{known}' for known in same)}?"
    close = did_you_mean(f"{dashes}{key}", [f"{dashes}{known}" for known in known_keys()])
    return close or f"; {program_name()} fit --help all lists every option"


def _wrong_type(text: str) -> str | None:
    """Rewrite jsonargparse's message on a value of the wrong type: "key: got value, pass types"."""
    key = re.match(r'Parser key "([\w.]+)": ', text)
    types = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[([^]]*)\])", text)
    # "Given value:" at the end is the text; "Got value:" is repeated for each type of a union
    given = re.search(r"Given value:\s*(.*)$", text) or re.search(r"Got value:\s*(.*)$", text)
    if not key or not types or not given or text.count("Expected a") != len(types):
        return None
    accepted = [_TYPES.get(name, name) or values for name, values in types]
    got = "null" if given[1] == "None" else repr(given[1])
    return f"{key[1]}: got {got}, pass {' or '.join(dict.fromkeys(accepted))}"


def _wrong_section(text: str) -> str | None:
    """Rewrite jsonargparse's message on a section that is not a mapping."""
    match = re.match(r'Parser key "(\w+)": Unable to load config (\S+)', text)
    return (
        f"{match[1]}: got {match[2]}, pass {{key: value}}, or a YAML file with keys"
        if match
        else None
    )


def _wrong_list(text: str) -> str | None:
    """Rewrite jsonargparse's message on a list with items of the wrong type."""
    match = re.match(r'Parser key "(data\.(?:mean|std))": ', text)
    return f"{match[1]}: pass 3 numbers, e.g. [0.5, 0.5, 0.5], or null" if match else None


# trainer key -> example of a class that it accepts
_CLASSES = {
    "callbacks": "lightning.pytorch.callbacks.EarlyStopping",
    "logger": "lightning.pytorch.loggers.TensorBoardLogger",
    "plugins": "lightning.pytorch.plugins.MixedPrecision",
}


def _not_a_class(text: str) -> str | None:
    """Rewrite jsonargparse's message on a value that should name a class."""
    match = re.match(
        r'Parser key "trainer\.(\w+)": .*Expected a path but (.*?) either not accessible', text
    )
    if match is None or match[1] not in _CLASSES:
        return None
    return (
        f"trainer.{match[1]}: got {match[2]!r}, pass the import path of a class, "
        f"e.g. {_CLASSES[match[1]]}"
    )


def _wrong_class_argument(text: str) -> str | None:
    """Rewrite jsonargparse's message on an unknown or missing argument of a callback or logger."""
    match = re.match(
        r'Parser key "([\w.]+)": .*?Problem with given class_path \'[\w.]*?(\w+)\': '
        r"(?:Option '([^']*)' is not accepted|the following arguments are required: (\w+))",
        text,
    )
    if match is None:
        return None
    key, name, unknown, missing = match.groups()
    if unknown:
        return f"{key}: {name} has no argument {unknown}; omit it"
    return f"{key}: {name} needs {missing}; pass --{key}.{missing} VALUE"


def _wrong_flag(text: str) -> str | None:
    """Rewrite argparse's message on a flag that is neither true nor false."""
    match = re.search(r"argument (--\w+)\S*: invalid _boolean_type value: (.*)", text)
    return f"{match[1]}: got {match[2]}, pass true or false" if match else None


def _no_accelerator(text: str) -> str | None:
    """Rewrite Lightning's message on an accelerator that this machine does not have."""
    unavailable = "can not run on your system since the accelerator is not available"
    if unavailable in text or "Requirement 'torch_xla" in text:
        return (
            "trainer.accelerator: this accelerator is not available on this machine; "
            "pass cpu or auto"
        )
    if "`devices` selected with `CPUAccelerator`" in text:
        return "trainer.devices: on a CPU, pass the number of processes, e.g. 1"
    if "No supported gpu backend found" in text:
        return "trainer.accelerator: got 'gpu', but PyTorch finds no GPU; pass cpu or auto"
    return None


# trainer key -> names that it accepts; others need packages or shard the weights
_NAMES = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "strategy": ("auto", "ddp", "ddp_spawn", "ddp_find_unused_parameters_true"),
}


def _unknown_name(text: str) -> str | None:
    """Rewrite Lightning's message on an unknown accelerator or strategy."""
    match = re.search(r"invalid (\w+) name: `\w+='([^']*)'`", text)
    if match is None or match[1] not in _NAMES:
        return None
    known = _NAMES[match[1]]
    hint = did_you_mean(match[2], known)
    return f"trainer.{match[1]}: got {match[2]!r}, pass one of {', '.join(known)}{hint}"


def _not_logged(text: str) -> str | None:
    """Rewrite Lightning's message on a callback that monitors an unknown metric."""
    match = re.search(
        r"conditioned on metric `([^`]*)`|\(monitor='([^']*)'\)` could not find", text
    )
    if match is None:
        return None
    name = match[1] or match[2]
    known = [key for key in re.findall(r"[`']([a-z]+/\w+)[`']", text) if key != name]
    hint = did_you_mean(name, known) or "; pass e.g. val/acc1_truncate_mean or val/loss"
    return f"trainer.callbacks: the metric {name!r} is not logged{hint}"


def _same_callback(text: str) -> str | None:
    """Rewrite Lightning's message on two callbacks whose states have the same key."""
    match = re.search(r"more than one stateful callback of type `(\w+)`", text)
    if match is None:
        return None
    own = ", like best-*.ckpt and last.ckpt of the run" if match[1] == "ModelCheckpoint" else ""
    return (
        f"trainer.callbacks: two of type {match[1]} have the same monitor and interval{own}; "
        "pass another monitor, e.g. val/loss"
    )
