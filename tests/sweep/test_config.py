"""Reading sweep files: types, nesting, ranges, grids, and errors of one line."""

import math

import pytest
import yaml

from tq_lightning.errors import UserError
from tq_lightning.sweep.config import grid_point, grid_size, read_sweep, with_extra
from tq_lightning.sweep.parameters import format_argument


def grid(sweep):
    return [grid_point(sweep, i) for i in range(grid_size(sweep))]


def one(write_sweep, entry, method="random"):
    return read_sweep(write_sweep(method=method, parameters={"model.lr": entry})).parameters[
        "model.lr"
    ]


def test_types_nesting_and_order_are_kept(write_sweep):
    sweep = read_sweep(
        write_sweep(
            parameters={
                "seed_everything": {"values": [0, 1]},
                "model": {
                    "parameters": {
                        "widths": {"values": [[8, 4], [8]]},
                        "activations": {"values": [None, "clamp_round"]},
                        "compile": {"values": [True, False]},
                        "deep": {
                            "parameters": {"lr": {"values": ["1e-3", 0.1]}, "n": {"value": None}}
                        },
                    }
                },
            }
        )
    )
    assert list(sweep.parameters) == [
        "seed_everything",
        "model.widths",
        "model.activations",
        "model.compile",
        "model.deep.lr",
    ]
    assert sweep.constants == {"model.deep.n": None}
    points = grid(sweep)
    assert len(points) == 2**5 and points[0] == {
        "seed_everything": 0,
        "model.widths": [8, 4],
        "model.activations": None,
        "model.compile": True,
        "model.deep.lr": "1e-3",
    }
    assert len({repr(point) for point in points}) == 32
    assert [point["model.deep.lr"] for point in points[:3]] == [
        "1e-3",
        0.1,
        "1e-3",
    ]  # the last key varies fastest


@pytest.mark.parametrize(
    "value", [None, True, False, 3, 0.1, 1e-7, [8, 4], [None, "a"], {"a": [1, None]}]
)
def test_argument_round_trip_keeps_the_type(value):
    key, text = format_argument("model.x", value).split("=", 1)
    back = yaml.safe_load(text.replace("e-", ".0e-") if "e-" in text else text)
    assert key == "--model.x" and back == value and type(back) is type(value)


def test_string_is_passed_unchanged():
    assert format_argument("model.ste", "identity") == "--model.ste=identity"


@pytest.mark.parametrize(
    ("entry", "low", "high", "log", "q", "integer"),
    [
        ({"min": 1, "max": 5}, 1, 5, False, None, True),
        ({"min": 1, "max": 5.0}, 1, 5, False, None, False),
        ({"min": "1e-3", "max": 1}, 1e-3, 1, False, None, False),
        ({"min": 1e-3, "max": 1, "distribution": "log_uniform_values"}, 1e-3, 1, True, None, False),
        ({"min": -2, "max": 0, "distribution": "log_uniform"}, math.exp(-2), 1, True, None, False),
        ({"min": 16, "max": 64, "q": 16, "distribution": "q_uniform"}, 16, 64, False, 16, True),
        ({"min": 0.5, "max": 2, "q": 0.5, "distribution": "q_uniform"}, 0.5, 2, False, 0.5, False),
        (
            {"min": 8, "max": 64, "q": 8, "distribution": "q_log_uniform_values"},
            8,
            64,
            True,
            8,
            True,
        ),
    ],
)
def test_ranges_are_read_as_documented_by_wandb(write_sweep, entry, low, high, log, q, integer):
    p = one(write_sweep, entry)
    assert (p.low, p.high, p.log, p.q, p.integer) == (
        pytest.approx(low),
        pytest.approx(high),
        log,
        q,
        integer,
    )


def test_grid_includes_integer_ranges(write_sweep):
    sweep = read_sweep(
        write_sweep(
            parameters={
                "a": {"min": 1, "max": 3},
                "b": {"min": 0.5, "max": 1.6, "q": 0.5, "distribution": "q_uniform"},
            }
        )
    )
    assert [point["a"] for point in grid(sweep)[::3]] == [1, 2, 3]
    assert [point["b"] for point in grid(sweep)[:3]] == [0.5, 1.0, 1.5]


BAD = [
    ({"methd": "grid"}, "unknown key 'methd'; did you mean method?"),
    ({"method": "genetic"}, "method: expected grid, random or bayes, got 'genetic'"),
    ({"parameters": {}}, "parameters: expected keys"),
    ({"parameters": {"a": {"value": 1}}}, "nothing to search"),
    ({"parameters": {"a": 3}}, "parameters.a: expected value, values or min and max, got 3"),
    ({"parameters": {"a": {"value": 1, "valeus": [1]}}}, "did you mean value"),
    ({"parameters": {"a": {"values": []}}}, "expected a list of at least one value"),
    ({"parameters": {"a": {"values": [1, True]}}}, "1 and True are equal"),
    ({"parameters": {"a": {"values": [1, 2], "probabilities": [0.5, 0.4]}}}, "add up to 1"),
    ({"parameters": {"a": {"values": [1], "distribution": "uniform"}}}, "expected categorical"),
    (
        {"parameters": {"a": {"min": 3, "max": 3}}},
        "expected min < max, got min 3 and max 3",
    ),
    ({"parameters": {"a": {"min": 1, "max": 0}}}, "expected min < max"),
    ({"parameters": {"a": {"min": 1}}}, "both min and max, got min"),
    ({"parameters": {"a": {"min": "low", "max": 1}}}, "expected a number, got 'low'"),
    (
        {"method": "random", "parameters": {"a": {"min": 0.1, "max": 1, "distribution": "normal"}}},
        "normal is not supported by Optuna",
    ),
    (
        {"method": "random", "parameters": {"a": {"distribution": "normal", "mu": 0, "sigma": 1}}},
        "normal is not supported by Optuna",
    ),
    ({"method": "random", "parameters": {"a": {"mu": 0, "sigma": 1}}}, "unknown key 'mu'"),
    (
        {
            "method": "random",
            "parameters": {"a": {"min": 0, "max": 1.0, "distribution": "log_uniform_values"}},
        },
        "must be > 0",
    ),
    (
        {
            "method": "random",
            "parameters": {"a": {"min": 1, "max": 2, "q": 8, "distribution": "q_uniform"}},
        },
        "no multiple of q",
    ),
    (
        {"parameters": {"a": {"min": 0.1, "max": 1, "q": 1e-320, "distribution": "q_uniform"}}},
        "parameters.a: q: expected at most 2^53 multiples, got q 1e-320 with min 0.1 and max 1",
    ),
    (
        {"method": "random", "parameters": {"a": {"min": 1, "max": 2, "q": 8}}},
        "q needs a q_ distribution",
    ),
    ({"parameters": {"a": {"min": 0.1, "max": 1.0}}}, "a grid needs values"),
    (
        {"parameters": {"m.a": {"values": [1, 2]}, "m": {"parameters": {"a": {"values": [1]}}}}},
        "duplicate key m.a",
    ),
    ({"metric": {"name": "x", "goal": "max"}}, "goal: expected minimize or maximize"),
    ({"metric": "x"}, "metric: expected name and goal"),
    ({"run_cap": 0}, "run_cap: expected an integer >= 1"),
    *(
        (
            {"method": "random", "parameters": {"a": entry}},
            f"parameters.a: got both {both}; keep one of them",
        )
        for entry, both in (
            ({"value": 1, "values": [2]}, "value and values"),
            ({"values": [2], "min": 1, "max": 2}, "values and min"),
            ({"min": 1, "max": 2, "probabilities": [1]}, "min and probabilities"),
            ({"parameters": {"b": {"value": 1}}, "value": 1}, "parameters and value"),
            ({"value": 1, "distribution": "uniform"}, "value and distribution 'uniform'"),
        )
    ),
    *(
        ({"parameters": parameters}, message)
        for parameters, message in (
            (
                {"model.lr": {"values": [1, 2]}, "model": {"values": [{"lr": 3}, {"opt": "sgd"}]}},
                "model.lr is set by both model.lr and model; keep one",
            ),
            (
                {"model": {"values": [{"lr": 3}, {"lr": 4}]}, "model.lr": {"min": 1, "max": 2}},
                "model.lr is set by both model and model.lr; keep one",
            ),
            (
                {
                    "model.opt_args.nesterov": {"values": [True, False]},
                    "model.opt_args": {"values": [{"dampening": 0}, {"dampening": 0.1}]},
                },
                "model.opt_args.nesterov is set by both model.opt_args.nesterov and model.opt_args",
            ),
        )
    ),
    ({"parameters": {"a": {"values": [1, "1"]}}}, "1 and '1' are equal"),
    ({"parameters": {"a": {"values": [None, "null"]}}}, "None and 'null' are equal"),
    (
        {"parameters": {"a": {"min": 1.5, "max": 3, "distribution": "int_uniform"}}},
        "parameters.a: int_uniform needs integers, got min 1.5 and max 3",
    ),
    (
        {"parameters": {"trainer.default_root_dir": {"values": ["a", "b"]}}},
        "the sweep sets it; pass --dir",
    ),
    (
        {
            "parameters": {
                "a": {"values": [1]},
                "trainer": {"parameters": {"default_root_dir": {"value": "a"}}},
            }
        },
        "the sweep sets it; pass --dir",
    ),
    ({"parameters": {"ckpt_path": {"values": ["a"]}}}, "the sweep resumes trials itself"),
    *(
        ({"parameters": {"a": {"values": [1]}, **more}}, message)
        for more, message in (
            ({"ckpt_path": {"value": "a"}}, "got ckpt_path, but the sweep resumes trials itself"),
            ({"print_config": {"value": ""}}, "got print_config, but it trains nothing"),
            ({"run_dir": {"value": "a"}}, "got run_dir, but each trial has its own folder"),
            (
                {"trainer": {"value": {"max_epochs": 1, "default_root_dir": "a"}}},
                "got trainer.default_root_dir, but the sweep sets it; pass --dir",
            ),
            (
                {"trainer": {"values": [{"max_epochs": 1}, {"default_root_dir": "a"}]}},
                "got trainer.default_root_dir, but the sweep sets it; pass --dir",
            ),
        )
    ),
    (
        {"command": ["python", "-m", "tq_lightning", "fit", "--run_dir=a", "${args}"]},
        "command: got run_dir, but each trial has its own folder",
    ),
    (
        {"early_terminate": {"type": "hyperband", "max_iter": 9, "s": 10**9}},
        "early_terminate: expected eta**s <= 2**100",
    ),
    ({"early_terminate": {"type": "envelope"}}, "type: expected hyperband"),
    ({"early_terminate": {"type": "hyperband"}}, "expected min_iter, or max_iter and s"),
    (
        {"early_terminate": {"type": "hyperband", "min_iter": 2, "strict": True}},
        "unknown key 'strict'",
    ),
]


@pytest.mark.parametrize(("keys", "message"), BAD)
def test_invalid_key_is_an_error_of_one_line(write_sweep, keys, message):
    path = write_sweep(**keys)
    with pytest.raises(UserError) as caught:
        read_sweep(path)
    assert (
        message in str(caught.value)
        and "\n" not in str(caught.value)
        and str(path) in str(caught.value)
    )


def test_file_that_is_not_a_sweep_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        read_sweep(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="is not a sweep file"):
        read_sweep(tmp_path / "list.yaml")


def test_extra_arguments_cannot_override_searched_keys(write_sweep):
    sweep = read_sweep(write_sweep())
    assert with_extra(sweep, ["--trainer.max_epochs=2"]).extra == ("--trainer.max_epochs=2",)
    assert (
        with_extra(sweep, ["--trainer.max_epochs=2"]).source
        != sweep.source
        == with_extra(sweep, []).source
    )
    with pytest.raises(UserError, match=r"searches model\.lr"):
        with_extra(sweep, ["--model.lr=1"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trainer.default_root_dir=x"], "the sweep sets it; pass --dir"),
        (["--trainer.default_root_dir", "x"], "the sweep sets it; pass --dir"),
        (["--run_dir", "x"], "each trial has its own folder"),
        (["--ckpt_path=last"], "the sweep resumes trials itself"),
        (["--print_config"], "--print_config trains nothing"),
        (["--print_config=skip_null"], "trains nothing"),
    ],
)
def test_extra_arguments_that_the_sweep_cannot_run_are_an_error(write_sweep, extra, message):
    with pytest.raises(UserError, match=message):
        with_extra(read_sweep(write_sweep()), extra)


def test_consistent_entries_are_read(write_sweep):
    parameters = {
        "a": {"value": 1, "distribution": "constant"},
        "b": {"values": [1, "a"], "distribution": "categorical", "probabilities": [0.5, 0.5]},
        "c": {"min": 1.0, "max": 3.0, "distribution": "int_uniform"},
        "d": {"min": 1, "max": 8, "q": 2, "distribution": "q_uniform"},
        "model": {"values": [{"ste": "scaled", "opt": "sgd"}, {"ste": "identity"}]},
        "model.lr": {"values": [0.1, 0.2]},
        "model.opt_args": {"values": [{"dampening": 0}, {"dampening": 0.1}]},
        "model.opt_args.nesterov": {"values": [True, False]},
    }
    early = {"type": "hyperband", "max_iter": 27, "s": 3}
    path = write_sweep(method="random", parameters=parameters, early_terminate=early)
    assert list(read_sweep(path).parameters) == [key for key in parameters if key != "a"]


FIT = ["-m", "tq_lightning", "fit"]


def test_command_sets_arguments_and_environment(write_sweep, monkeypatch):
    monkeypatch.setenv("CONF", "conf/a.yaml")
    command = [
        "${env}",
        "WANDB_MODE=offline",
        "python",
        "-m",
        "tq_lightning",
        "fit",
        "--config",
        "${envvar:CONF}",
        "--wandb",
        "${args}",
    ]
    sweep = read_sweep(write_sweep(command=command))
    assert sweep.environment == {"WANDB_MODE": "offline"}
    assert sweep.arguments == ("--config", "conf/a.yaml")  # --wandb is for W&B's agents


@pytest.mark.parametrize(
    "start",
    [
        ["/usr/bin/env", "python", *FIT],
        ["${env}", "${interpreter}", *FIT],
        ["/opt/venv/bin/python3.12", "-u", *FIT],
        ["tq-lightning", "fit"],
        ["${env}", "/opt/venv/bin/tq-lightning", "fit"],
    ],
)
def test_every_usual_start_of_the_program_is_accepted(write_sweep, start):
    sweep = read_sweep(write_sweep(command=[*start, "--config", "a.yaml", "${args}"]))
    assert sweep.arguments == ("--config", "a.yaml") and sweep.environment == {}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (None, "expected a list that ends in ${args}"),
        (["python", "train.py", "${args}"], 'expected ["${env}", python, -m, tq_lightning, fit'),
        (["tq-lightning", "test", "${args}"], 'expected ["${env}", python, -m, tq_lightning, fit'),
        (["python", *FIT, "${args_json}", "${args}"], "${args_json} is not supported after `fit`"),
        (["torchrun", "--nproc_per_node=2", *FIT, "${args}"], "'torchrun' is not supported before"),
        (["srun", "-n", "2", "tq-lightning", "fit", "${args}"], "'srun' is not supported before"),
        (["python", "-m", "torch.distributed.run", *FIT, "${args}"], "'torch.distributed.run' is"),
    ],
)
def test_another_command_is_an_error_of_one_line(write_sweep, command, message):
    path = write_sweep(command=command)
    with pytest.raises(UserError) as caught:
        read_sweep(path)
    text = str(caught.value)
    assert message in text and "\n" not in text and f"{path}: command" in text
