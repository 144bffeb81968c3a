"""Translate a sweep to Optuna: distributions, samplers and the pruner.

| sweep file | Optuna |
|---|---|
| values | CategoricalDistribution; lists and mappings as JSON, since storages keep only scalars |
| values with probabilities | the same, drawn with the weights (`weighted_choices`) |
| int_uniform | IntDistribution |
| uniform | FloatDistribution |
| q_uniform | the same with step=q, from the first to the last multiple of q in the range |
| log_uniform_values | FloatDistribution(log=True) |
| log_uniform | the same; the ends are exponents of e, as in W&B |
| q_log_uniform_values, q_log_uniform | the same, rounded to a multiple of q for `fit` |
| grid | every point is enqueued (`trial_queue`) |
| random, bayes | RandomSampler, TPESampler |
| hyperband | HyperbandPruner |
"""

import json
import random
from typing import TYPE_CHECKING, Any

from tq_lightning.sweep.config import Sweep
from tq_lightning.sweep.parameters import Parameter, format_argument, multiples, round_to_step

if TYPE_CHECKING:
    import optuna

STARTUP_TRIALS = 10  # random trials before TPE starts to model; Optuna's own default


def distribution(parameter: Parameter) -> "optuna.distributions.BaseDistribution":
    """Return the Optuna distribution of a parameter; see the module's table."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values:
        return CategoricalDistribution([_label(value) for value in parameter.values])
    low, high, q = parameter.low, parameter.high, parameter.q
    if parameter.log:
        return FloatDistribution(low, high, log=True)
    if q is not None:
        low, high = (float(f"{k * q:.12g}") for k in multiples(parameter))
    if parameter.integer:
        return IntDistribution(round(low), round(high), step=round(q or 1))
    return FloatDistribution(low, high, step=q)


def encode(sweep: Sweep, point: dict[str, Any]) -> dict[str, Any]:
    """Convert a point of a grid to the values that Optuna stores."""
    return {
        key: _label(value) if sweep.parameters[key].values else value
        for key, value in point.items()
    }


def decode(parameter: Parameter, stored: Any) -> Any:
    """Convert a stored value to the one passed to `fit`, with its type in the sweep file."""
    if parameter.values:
        return next(value for value in parameter.values if _label(value) == stored)
    return round_to_step(stored, parameter)


def weighted_choices(sweep: Sweep, point: int) -> dict[str, Any]:
    """Draw the parameters with probabilities for one point of a random or bayes sweep.

    These values are fixed in advance, because Optuna's samplers do not support weights. After its
    startup trials, TPE chooses the values itself.
    """
    if sweep.method == "bayes" and point >= STARTUP_TRIALS:
        return {}
    draw = random.Random(point)
    return {
        key: _label(draw.choices(parameter.values, parameter.weights)[0])
        for key, parameter in sweep.parameters.items()
        if parameter.weights is not None
    }


def suggest(sweep: Sweep, trial: "optuna.trial.Trial") -> dict[str, Any]:
    """Sample every searched key. Return key -> value, with the constants of the file last."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    values = {}
    for key, parameter in sweep.parameters.items():
        space: Any = distribution(parameter)
        if isinstance(space, CategoricalDistribution):
            stored: Any = trial.suggest_categorical(key, space.choices)
        elif isinstance(space, IntDistribution):
            stored = trial.suggest_int(key, space.low, space.high, step=space.step)
        else:
            stored = trial.suggest_float(key, space.low, space.high, step=space.step, log=space.log)
        values[key] = decode(parameter, stored)
    return values | sweep.constants


def fit_arguments(sweep: Sweep, values: dict[str, Any]) -> list[str]:
    """Return the arguments of `fit` for one trial. Later arguments override earlier ones.

    The order is: the file's `command`, its constants, the arguments after `--`, the searched
    values. The searched values come last so that a `--config` after `--` can't override them. A
    searched or constant `config` follows the last `--config` of the command, or comes first, so
    that it overrides only configuration files.
    """
    config = [format_argument(key, value) for key, value in values.items() if key == "config"]
    rest = {key: value for key, value in values.items() if key != "config"}
    constants = [
        format_argument(key, value) for key, value in rest.items() if key not in sweep.parameters
    ]
    searched = [
        format_argument(key, value) for key, value in rest.items() if key in sweep.parameters
    ]
    cut = max(
        (
            i + (1 if "=" in word else 2)
            for i, word in enumerate(sweep.arguments)
            if word.split("=", 1)[0] in ("--config", "-c")
        ),
        default=0,
    )
    first, others = sweep.arguments[:cut], sweep.arguments[cut:]
    return [*first, *config, *others, *constants, *sweep.extra, *searched]


def sampler(sweep: Sweep, point: int) -> "optuna.samplers.BaseSampler":
    """Return a sampler seeded by the point, so that random sweeps do not depend on the worker."""
    from optuna.samplers import RandomSampler, TPESampler

    if sweep.method == "bayes":
        # constant_liar counts the points that are still running, so that two workers don't try
        # the same region.
        return TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=point
        )
    return RandomSampler(seed=point)  # every value of a grid point is fixed


def pruner(sweep: Sweep, objectives: int) -> "optuna.pruners.BasePruner":
    """Return a HyperbandPruner with the file's settings; several objectives disable pruning.

    A step is one logged value of the metric, as in W&B. With max_iter and s brackets the shortest
    trial has max_iter / eta**s steps.
    """
    from optuna.pruners import HyperbandPruner, NopPruner

    numbers = sweep.early_terminate
    if numbers is None or objectives > 1:
        return NopPruner()
    eta = round(numbers.get("eta", 3))
    longest: int | str = round(numbers["max_iter"]) if "max_iter" in numbers else "auto"
    shortest = numbers.get("min_iter") or max(1, numbers["max_iter"] / eta ** numbers["s"])
    return HyperbandPruner(min_resource=round(shortest), max_resource=longest, reduction_factor=eta)


def _label(value: Any) -> Any:
    """Convert a choice to a type that Optuna's storages support."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value)
