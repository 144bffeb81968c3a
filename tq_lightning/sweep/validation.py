"""What can be known to be wrong before any training starts: each arm goes through the real command-line parser."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.records import STORAGE_BYTES
from tq_lightning.sweep import config as space
from tq_lightning.sweep import search_space as twins
from tq_lightning.sweep.parameters import rounded


def check_arms(sweep: space.Sweep, metrics: list[str]) -> None:
    """Parse every value of every searched key as `fit` would, and look for `metrics` among what such a run logs.

    Each arm's LightningModule and data module are made, and its quantizers put on a toy network, so that a misspelt value is
    found too; no data is read and no model built. Raises UserError with the arm in front.
    """
    parse = fit_parser()
    for values in every_value(sweep):
        arm = " ".join(space.argument(key, value) for key, value in values.items())
        try:
            logged = logged_metrics(parse(twins.arguments(sweep, values)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{sweep.path}: {arm}: {' '.join(str(error).split())}") from None
        for name in metrics:
            if name not in logged:
                raise UserError(
                    f"{sweep.path}: metric {name!r} is never logged with {arm}; pass one of {_in_words(logged)}"
                )


def every_value(sweep: space.Sweep) -> Iterator[dict[str, Any]]:
    """As few points as hold every value of every choice and both ends of every range."""
    axes = {
        key: parameter.values
        or (rounded(parameter.low, parameter), rounded(parameter.high, parameter))
        for key, parameter in sweep.parameters.items()
    }
    for i in range(max(map(len, axes.values()))):
        yield {key: axis[i % len(axis)] for key, axis in axes.items()} | sweep.constants


@functools.cache
def fit_parser() -> Callable[[list[str]], Any]:
    """The parser of `fit`: arguments -> its configuration. It raises UserError for arguments that `fit` would refuse."""
    from jsonargparse import ArgumentError

    from tq_lightning.data.datamodule import TQDataModule
    from tq_lightning.training.cli_messages import one_line
    from tq_lightning.training.lightning_cli import TQCLI
    from tq_lightning.training.module import TQModule

    class ParserOnly(TQCLI):
        """The command line up to the point where it would read its arguments."""

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

    def parse(arguments: list[str]) -> Any:
        try:
            return parser.parse_args(["fit", *arguments])["fit"]
        except ArgumentError as error:
            hint = (
                "; it is looked for from the folder that the sweep is run in"
                if "does not exist" in str(error)
                else ""
            )
            raise UserError(one_line(error) + hint) from None

    return parse


def logged_metrics(config: Any) -> list[str]:
    """The names that a run can be judged by. Raises ValueError for a value that `fit` would refuse later."""
    import timm
    import torch

    from tq_lightning.callbacks.truncation_eval import width_metrics
    from tq_lightning.data.datamodule import TQDataModule
    from tq_lightning.models import create_model
    from tq_lightning.quant.prepare import prepare
    from tq_lightning.training.module import TQModule, width_key

    module = TQModule(**config["model"])
    TQDataModule(**config["data"])
    given: Any = module.hparams
    if ":" not in given.name and not timm.is_model(given.name):
        create_model(given.name)  # raises the error that says which names are near
    toy = torch.nn.Sequential(
        *(layer for _ in range(3) for layer in (torch.nn.Linear(2, 2), torch.nn.ReLU()))
    )
    same = {
        key: given[key]
        for key in ("quantizer", "ste", "level", "normalizer", "max_bits", "activations", "norm")
    }
    prepare(toy, widths=module.widths, verbose=False, **same)
    widths = range(1, given.max_bits + 1)
    scores = {(bits, "truncate"): 0.0 for bits in (*widths, None)} | {(None, "quantize"): 0.0}
    return [
        *width_metrics("val", scores, given.max_bits, module.widths),
        *(f"train/loss_{width_key(b)}" for b in module.passes),
        STORAGE_BYTES,
    ]


class _BuiltError(Exception):
    """Carries the parser out of LightningCLI, which offers no way to build one without running it."""


def _in_words(names: list[str]) -> str:
    """Metric names, the widths of one kind together."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        stem, width = re.fullmatch(r"(.*?)(?:_w(\d))?", name).groups()  # type: ignore[union-attr]
        kinds.setdefault(stem, []).extend([width] if width else [])
    return ", ".join(
        f"{stem}_w{{{','.join(sorted(widths))}}}" if widths else stem
        for stem, widths in kinds.items()
    )
