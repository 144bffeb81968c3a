"""Check a sweep before any training starts: every arm passes the real command-line parser."""

import contextlib
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tq_lightning.errors import UserError, message_of
from tq_lightning.records import STORAGE_BYTES, goal_of
from tq_lightning.sweep.config import Sweep
from tq_lightning.sweep.parameters import format_argument, round_to_step
from tq_lightning.sweep.search_space import fit_arguments
from tq_lightning.sweep.value_checks import check_free

MAX_CHECKED = 1000  # arms; checking one takes a few milliseconds


def check_arms(sweep: Sweep, metrics: list[str]) -> None:
    """Check every value of every searched key as `fit` would, and that `metrics` are logged.

    For each arm the LightningModule and the data module are constructed, and a toy network is
    prepared with its quantizers, so that misspelled values are found too. No data is read and
    no model is built.

    Raises:
        UserError: the first error, with the arguments of its arm.
    """
    from tq_lightning.training.trainer_validation import check_run

    parse = fit_parser()
    for values in itertools.islice(every_value(sweep), MAX_CHECKED):
        arm = " ".join(format_argument(key, value) for key, value in values.items())
        try:
            config = parse(fit_arguments(sweep, values))
            check_run("fit", config)
            # of a file in --config; trainer.default_root_dir of one is overridden
            check_free([key for key in ("run_dir", "ckpt_path") if config[key] is not None], "fit")
            logged = logged_metrics(config)
        except (ValueError, TypeError) as error:
            raise UserError(f"{sweep.path}: {arm}: {message_of(error)}") from None
        for name in metrics:
            if name not in logged:
                raise UserError(
                    f"{sweep.path}: metric {name!r} is never logged with {arm}; "
                    f"pass one of {_compact(logged)}"
                )


def check_goals(sweep: Sweep, objectives: dict[str, str]) -> None:
    """Check that no objective is optimized in the wrong direction.

    Raises:
        UserError: an accuracy is minimized, or a loss, a perplexity or a size is maximized. A sweep
            file without a goal minimizes its metric, as in W&B.
    """
    for name, goal in objectives.items():
        expected = goal_of(name)
        if expected not in (None, goal):
            better = "higher" if expected == "maximize" else "lower"
            raise UserError(
                f"{sweep.path}: the goal of {name} is {goal}, but {better} is better; set "
                f"goal: {expected}, or pass --objectives {name}:{expected[:3]}"
            )


def every_value(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield the fewest points that contain every choice and both ends of every range."""
    axes = {
        key: parameter.values
        or (round_to_step(parameter.low, parameter), round_to_step(parameter.high, parameter))
        for key, parameter in sweep.parameters.items()
    }
    for i in range(max(map(len, axes.values()))):
        yield {key: axis[i % len(axis)] for key, axis in axes.items()} | sweep.constants


@functools.cache
def fit_parser() -> Callable[[list[str]], Any]:
    """Return a function that parses arguments of `fit` into its configuration.

    The function raises UserError for arguments that `fit` would reject.
    """
    from jsonargparse import ArgumentError

    from tq_lightning.data.datamodule import TQDataModule
    from tq_lightning.training.cli_messages import rewrite_parser_error
    from tq_lightning.training.lightning_cli import TQCLI
    from tq_lightning.training.module import TQModule

    class ParserOnly(TQCLI):
        """LightningCLI that stops before it parses its arguments."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _BuiltError(parser)

    try:
        ParserOnly(
            TQModule,
            TQDataModule,
            parser_kwargs={"parser_mode": "tq", "exit_on_error": False},
            args=[],
        )
    except _BuiltError as built:
        parser = built.args[0]

    def parse(argv: list[str]) -> Any:
        page = io.StringIO()
        try:
            with contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):
                return parser.parse_args(["fit", *argv])["fit"]
        except SystemExit:  # -h, --help, --optimizer.help
            raise UserError("an argument asks for help and trains nothing; remove it") from None
        except ArgumentError as error:
            hint = ""
            if "does not exist" in str(error):
                hint = "; paths are relative to the folder where the sweep is started"
            raise UserError(rewrite_parser_error(error) + hint) from None

    return parse


def logged_metrics(config: Any) -> list[str]:
    """Return the metrics that a run with this configuration logs.

    Raises:
        ValueError: a value that `fit` would reject after parsing.
    """
    import torch

    from tq_lightning.callbacks.scores import SCORES
    from tq_lightning.callbacks.width_metrics import Pass
    from tq_lightning.data.datamodule import TQDataModule
    from tq_lightning.quant.prepare import apply_config
    from tq_lightning.training.module import TQModule, width_key

    module = TQModule(**config["model"])
    TQDataModule(**config["data"])
    given: Any = module.hparams
    toy = torch.nn.Sequential(
        *(layer for _ in range(3) for layer in (torch.nn.Linear(2, 2), torch.nn.ReLU()))
    )
    # name patterns refer to layers of the real network, which the toy network lacks
    apply_config(toy, replace(module.quant, skip=("first", "last"), shared_norms=()))
    passes: list[Pass] = [(bits, "truncate") for bits in range(1, given.max_bits + 1)]
    passes.append((None, "quantize"))
    scores = SCORES[given.task](passes, given, module.widths, torch.device("cpu"))
    logits = torch.zeros(1, 1, 2) if given.task == "language_modeling" else torch.zeros(1, 2)
    scores.add(dict.fromkeys(passes, logits), torch.zeros(logits.shape[:-1], dtype=torch.int64))
    counts = ("val/images", "val/tokens")
    return [
        *(key for key in scores.metrics("val", lambda sums: sums) if key not in counts),
        *(f"train/loss_{width_key(b)}" for b in module.passes),
        STORAGE_BYTES,
    ]


class _BuiltError(Exception):
    """Raised to get the parser out of LightningCLI, which cannot build one without parsing."""


def _compact(names: list[str]) -> str:
    """List metric names, with the widths of each metric in braces."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        stem, width = re.fullmatch(r"(.*?)(?:_w(\d))?", name).groups()  # type: ignore[union-attr]
        kinds.setdefault(stem, []).extend([width] if width else [])
    return ", ".join(
        f"{stem}_w{{{','.join(sorted(widths))}}}" if widths else stem
        for stem, widths in kinds.items()
    )
