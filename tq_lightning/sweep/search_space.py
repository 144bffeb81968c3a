"""A sweep's words in Optuna's: distributions, samplers, the pruner.

| sweep file | Optuna |
|---|---|
| values | CategoricalDistribution; a list or mapping stands in it as its JSON text, since storages keep only scalars |
| values with probabilities | the same, drawn with its weights: always for random, in TPE's startup trials for bayes |
| int_uniform; uniform | IntDistribution; FloatDistribution |
| q_uniform | step=q from the first to the last multiple of q in the range |
| log_uniform_values, log_uniform | FloatDistribution(log=True); W&B takes the ends of log_uniform as exponents of e |
| q_log_uniform_values, q_log_uniform | FloatDistribution(log=True), rounded to a multiple of q on its way to the program |
| grid, random, bayes | every point enqueued (`ledger`), RandomSampler, TPESampler |
| hyperband | HyperbandPruner |
"""

import json
import random
from typing import TYPE_CHECKING, Any

from tq_lightning.sweep.config import Sweep, argument
from tq_lightning.sweep.parameters import Parameter, multiples, rounded

if TYPE_CHECKING:
    import optuna

STARTUP_TRIALS = 10  # random trials before TPE models anything: Optuna's own default, said here because weights hold for it


def distribution(parameter: Parameter) -> "optuna.distributions.BaseDistribution":
    """The Optuna twin of one parameter (module docstring)."""
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


def decode(parameter: Parameter, stored: Any) -> Any:
    """What Optuna's storage holds -> what the program gets, with the type that the sweep file gave it."""
    if parameter.values:
        return next(value for value in parameter.values if _label(value) == stored)
    return rounded(stored, parameter)


def fixed(sweep: Sweep, point: int) -> dict[str, Any]:
    """The values that are fixed before point number `point` of a random or bayes sweep is asked for: the weighted choices."""
    if sweep.method == "bayes" and point >= STARTUP_TRIALS:
        return {}
    draw = random.Random(point)
    return {
        key: _label(draw.choices(parameter.values, parameter.weights)[0])
        for key, parameter in sweep.parameters.items()
        if parameter.weights is not None
    }


def encode(sweep: Sweep, point: dict[str, Any]) -> dict[str, Any]:
    """A grid point as Optuna stores it."""
    return {
        key: _label(value) if sweep.parameters[key].values else value
        for key, value in point.items()
    }


def suggest(sweep: Sweep, trial: "optuna.trial.Trial") -> dict[str, Any]:
    """Ask for every searched key. Returns key -> value with its type, the constants of the file after them."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    values = {}
    for key, parameter in sweep.parameters.items():
        twin: Any = distribution(parameter)
        if isinstance(twin, CategoricalDistribution):
            stored: Any = trial.suggest_categorical(key, twin.choices)
        elif isinstance(twin, IntDistribution):
            stored = trial.suggest_int(key, twin.low, twin.high, step=twin.step)
        else:
            stored = trial.suggest_float(key, twin.low, twin.high, step=twin.step, log=twin.log)
        values[key] = decode(parameter, stored)
    return values | sweep.constants


def arguments(sweep: Sweep, values: dict[str, Any]) -> list[str]:
    """The arguments of `fit` for one trial; the later wins: the command's own, the file's constants, those after --, the point.

    What is searched comes last, so that a --config after -- can't undo the search in silence.
    """
    fixed = [argument(key, value) for key, value in values.items() if key not in sweep.parameters]
    searched = [argument(key, value) for key, value in values.items() if key in sweep.parameters]
    return [*sweep.arguments, *fixed, *sweep.extra, *searched]


def sampler(sweep: Sweep, point: int) -> "optuna.samplers.BaseSampler":
    """A sampler seeded by the point's number: a random sweep draws the same points whichever worker asks."""
    from optuna.samplers import RandomSampler, TPESampler

    if sweep.method == "bayes":
        # constant_liar: points that other workers are still running count, so that two workers don't try the same thing
        return TPESampler(
            n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=point
        )
    return RandomSampler(seed=point)  # a grid's values are all fixed; nothing is left to draw


def pruner(sweep: Sweep, objectives: int) -> "optuna.pruners.BasePruner":
    """HyperbandPruner with the file's numbers; none with several objectives, where Optuna has no pruning.

    One step is one logged value of the metric, as in W&B. max_iter with s brackets starts at max_iter / eta**s.
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
    """A choice as Optuna's storages can hold it."""
    return (
        value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
    )
