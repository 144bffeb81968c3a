"""Sweep parameters in Optuna: stored values, drawn values, arguments of fit."""

import collections
import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tq_lightning.sweep.config import grid_point, grid_size, read_sweep, with_extra
from tq_lightning.sweep.parameters import Parameter
from tq_lightning.sweep.search_space import (
    decode,
    distribution,
    encode,
    fit_arguments,
    pruner,
    sampler,
    suggest,
    weighted_choices,
)

TABLE = [
    (Parameter(values=(1, None, "a", True)), CategoricalDistribution([1, None, "a", True])),
    (Parameter(values=([8, 4], {"a": None})), CategoricalDistribution(["[8, 4]", '{"a": null}'])),
    (Parameter(low=1, high=5, integer=True), IntDistribution(1, 5)),
    (Parameter(low=0, high=1), FloatDistribution(0, 1)),
    (Parameter(low=1e-3, high=1, log=True), FloatDistribution(1e-3, 1, log=True)),
    (Parameter(low=16, high=64, q=16, integer=True), IntDistribution(16, 64, step=16)),
    (Parameter(low=10, high=70, q=16, integer=True), IntDistribution(16, 64, step=16)),
    (Parameter(low=0.5, high=2, q=0.5), FloatDistribution(0.5, 2.0, step=0.5)),
    (Parameter(low=0.1, high=0.7, q=0.1), FloatDistribution(0.1, 0.7, step=0.1)),
]


@pytest.mark.parametrize(("parameter", "expected"), TABLE)
def test_parameters_become_the_documented_distributions(parameter, expected):
    assert distribution(parameter) == expected


def test_list_values_are_decoded_to_lists(write_sweep):
    sweep = read_sweep(
        write_sweep(parameters={"w": {"values": [[8, 4], [8]]}, "n": {"values": [None, True]}})
    )
    for point in (grid_point(sweep, i) for i in range(grid_size(sweep))):
        stored = encode(sweep, point)
        assert {key: decode(sweep.parameters[key], stored[key]) for key in stored} == point
    assert encode(sweep, grid_point(sweep, 0)) == {"w": "[8, 4]", "n": None}


def draws(sweep, count=200):
    study = optuna.create_study()
    rows = []
    for point in range(count):
        study.sampler = sampler(sweep, point)
        study.enqueue_trial(weighted_choices(sweep, point))
        rows.append(suggest(sweep, study.ask()))
    return rows


def test_drawn_values_are_in_range_and_keep_their_type(write_sweep):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parameters = {
        "lr": {"min": 1e-4, "max": 1e-1, "distribution": "log_uniform_values"},
        "batch": {"min": 8, "max": 64, "q": 8, "distribution": "q_log_uniform_values"},
        "n": {"min": 1, "max": 3},
        "q": {"min": 0.5, "max": 2, "q": 0.5, "distribution": "q_uniform"},
        "p": {"values": ["often", "seldom", "never"], "probabilities": [0.8, 0.2, 0]},
        "c": {"value": None},
    }
    rows = draws(read_sweep(write_sweep(method="random", parameters=parameters)))
    assert all(1e-4 <= row["lr"] <= 1e-1 and row["c"] is None for row in rows)
    assert all(
        isinstance(row["batch"], int) and row["batch"] % 8 == 0 and 8 <= row["batch"] <= 64
        for row in rows
    )
    assert {row["n"] for row in rows} == {1, 2, 3} and all(
        isinstance(row["n"], int) for row in rows
    )
    assert {row["q"] for row in rows} == {0.5, 1.0, 1.5, 2.0}
    counted = collections.Counter(row["p"] for row in rows)
    assert (
        140 <= counted["often"] <= 180
        and counted["seldom"] == 200 - counted["often"]
        and "never" not in counted
    )
    halves = sum(
        row["lr"] < math.sqrt(1e-5) for row in rows
    )  # half of them are below the geometric mean
    assert 75 <= halves <= 125


def test_random_sweep_draws_the_same_points_in_every_worker(write_sweep):
    sweep = read_sweep(
        write_sweep(
            method="random", parameters={"lr": {"min": 0.0, "max": 1.0}, "m": {"min": 0, "max": 9}}
        )
    )
    first, second = draws(sweep, 5), draws(sweep, 5)
    assert first == second and len({row["lr"] for row in first}) == 5


def test_searched_arguments_follow_those_of_the_command(write_sweep):
    sweep = read_sweep(
        write_sweep(
            arguments=["--config", "a.yaml"],
            parameters={"w": {"values": [[8, 4]]}, "a": {"value": None}},
        )
    )
    study = optuna.create_study()
    study.enqueue_trial(encode(sweep, grid_point(sweep, 0)))
    assert fit_arguments(sweep, suggest(sweep, study.ask())) == [
        "--config",
        "a.yaml",
        "--a=null",
        "--w=[8, 4]",
    ]


def test_hyperband_settings_are_passed_to_the_pruner(write_sweep):
    early = {"type": "hyperband", "min_iter": 2, "eta": 4}
    sweep = read_sweep(write_sweep(early_terminate=early))
    assert isinstance(pruner(sweep, 1), optuna.pruners.HyperbandPruner) and isinstance(
        pruner(sweep, 2), optuna.pruners.NopPruner
    )
    assert isinstance(pruner(read_sweep(write_sweep()), 1), optuna.pruners.NopPruner)


def test_searched_arguments_follow_an_extra_config(write_sweep):
    parameters = {"model.lr": {"values": [0.1, 0.2]}, "trainer.max_epochs": {"value": 20}}
    sweep = with_extra(read_sweep(write_sweep(parameters=parameters)), ["--config", "b.yaml"])
    given = fit_arguments(sweep, {"model.lr": 0.2, "trainer.max_epochs": 20})
    assert given[-4:] == [
        "--trainer.max_epochs=20",
        "--config",
        "b.yaml",
        "--model.lr=0.2",
    ]  # constants may change


@pytest.mark.parametrize("entry", [{"values": ["b.yaml"]}, {"value": "b.yaml"}])
def test_config_of_the_parameters_overrides_only_configurations(write_sweep, entry):
    parameters = {
        "model.lr": {"values": [0.2]},
        "config": entry,
        "trainer.max_epochs": {"value": 2},
    }
    rest = ["--x=1", "--trainer.max_epochs=2", "--y=3", "--model.lr=0.2"]
    values = {"model.lr": 0.2, "config": "b.yaml", "trainer.max_epochs": 2}
    for before in ([], ["--config", "a.yaml"], ["--config=a.yaml"]):
        path = write_sweep(arguments=[*before, "--x=1"], parameters=parameters)
        sweep = with_extra(read_sweep(path), ["--y=3"])
        assert fit_arguments(sweep, values) == [*before, "--config=b.yaml", *rest]
