"""The files in sweeps/: all values pass the real parser, and all arms have the same budget."""

from pathlib import Path

import pytest
import yaml

from tq_lightning.errors import UserError
from tq_lightning.sweep.config import grid_point, grid_size, read_sweep, with_extra
from tq_lightning.sweep.search_space import fit_arguments
from tq_lightning.sweep.validation import (
    check_arms,
    check_goals,
    every_value,
    fit_parser,
    logged_metrics,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
POINTS = {
    "digits": 6,
    "floor_vs_round": 6,
    "floor_vs_round_finetune": 6,
    "ste": 162,
    "ste_deep": 6,
    "ste_small": 12,
    "levels": 18,
    "activations": 27,
    "activations_truncated": 24,
    "widths_and_distillation": 45,
    "learned_range": 12,
    "scale": 12,
    "ste_learned": 18,
    "non_uniform": 15,
    "non_uniform_native": 12,
}


@pytest.fixture(scope="module")
def parse():
    return fit_parser()


def test_every_sweep_file_is_tested():
    assert {path.stem for path in FILES} == {*POINTS, "lr", "lr_round"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sweep_file_passes_the_parser_of_fit_and_its_grid_expands(path, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert path.read_text().startswith("# Question: ")
    sweep = read_sweep(path)
    check_arms(sweep, [sweep.metric])
    for values in every_value(sweep):
        config = parse(fit_arguments(sweep, values))
        for key, value in values.items():
            assert config[key] == value and type(config[key]) is type(value), key
    if sweep.method == "grid":
        points = [grid_point(sweep, i) for i in range(grid_size(sweep))]
        assert len(points) == POINTS[path.stem] == len({repr(point) for point in points})
        seeds = [point["seed_everything"] for point in points]
        assert {seeds.count(seed) for seed in (0, 1, 2)} == {
            len(points) // 3
        }  # every arm has the same seeds
    assert "trainer.max_epochs" in sweep.constants  # and the same budget


def test_both_arms_have_the_same_learning_rate_search():
    floor, other = (
        yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
        for name in ("lr", "lr_round")
    )
    assert floor["parameters"].pop("model.quantizer") == {"value": "floor"}
    assert other["parameters"].pop("model.quantizer") == {"value": "round"}
    assert floor == other


END = "--trainer.max_epochs=1"


@pytest.mark.parametrize(
    ("parameters", "metric", "message"),
    [
        (
            {"model.quantiser": {"values": ["floor"]}},
            None,
            "unknown option --model.quantiser; did you mean --model.quantizer",
        ),
        ({"model.lr": {"values": [0.1, "fast"]}}, None, "--model.lr=fast: "),
        ({"seed_everything": {"values": [0, -5]}}, None, "seed_everything: got -5, pass an"),
        ({"trainer.max_epochs": {"values": [2, 0]}}, None, "trainer.max_epochs: got 0, pass 1"),
        ({"model.ste": {"values": ["identity", "identty"]}}, None, "identty"),
        ({"model.name": {"values": ["resnet9_cifar"]}}, None, "did you mean"),
        ({"model.widths": {"values": [[8, 9]]}}, None, "--model.widths=[8, 9]: "),
        (
            {"model.lr": {"values": [0.1]}},
            "val/acc1_truncate_w9",
            "'val/acc1_truncate_w9' is never logged with --model.lr=0.1; pass one of",
        ),
        (
            {"model.widths": {"values": [[8, 2], [8, 4]]}},
            "train/loss_w2",
            "'train/loss_w2' is never logged with --model.widths=[8, 4]",
        ),
    ],
)
def test_values_that_fit_rejects_are_errors_before_training(
    write_sweep, parameters, metric, message
):
    sweep = read_sweep(write_sweep(parameters=parameters, arguments=[END]))
    with pytest.raises(UserError) as caught:
        check_arms(sweep, [metric or sweep.metric])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["-h", "--help", "--optimizer.help"])
def test_request_for_help_is_an_error_and_prints_no_page(write_sweep, capsys, option):
    """The parser prints the page and exits with status 0, as if the sweep had run."""
    sweep = with_extra(read_sweep(write_sweep(arguments=[END])), [option])
    with pytest.raises(UserError, match=r"asks for help and trains nothing; remove it"):
        check_arms(sweep, [sweep.metric])
    assert capsys.readouterr() == ("", "")


def test_folder_or_checkpoint_of_a_configuration_is_an_error(write_sweep, tmp_path):
    """Every trial would write the same folder; the parent of run folders is overridden."""
    file = tmp_path / "fit.yaml"
    sweep = read_sweep(write_sweep(arguments=["--config", str(file), END]))
    file.write_text("trainer: {default_root_dir: elsewhere}")
    check_arms(sweep, [sweep.metric])
    for key in ("run_dir", "ckpt_path"):
        file.write_text(f"{key}: somewhere")
        with pytest.raises(UserError, match=f"--model.lr=0.1: fit: got {key}, but "):
            check_arms(sweep, [sweep.metric])


def test_fit_without_an_end_is_an_error_before_any_trial(write_sweep):
    with pytest.raises(UserError, match=r"the training needs an end: pass --trainer\.max_epochs"):
        check_arms(read_sweep(write_sweep()), ["val/acc1_float"])


def test_logged_metrics_are_accepted(write_sweep):
    check_arms(
        read_sweep(write_sweep(arguments=[END])),
        ["val/acc1_truncate_w3", "val/acc1_float", "train/loss_w2", "storage/bytes"],
    )
    check_arms(read_sweep(write_sweep(arguments=[END])), ["val/loss", "val/acc5_truncate_mean"])
    task = "--model.task=language_modeling"
    sweep = read_sweep(write_sweep(arguments=[END, task]))
    check_arms(sweep, ["val/ppl_truncate_w2", "val/ppl_truncate_mean", "val/loss_w4"])
    with pytest.raises(UserError, match=r"acc1_float' is never logged .*val/ppl_gap_w\{1,2,3"):
        check_arms(sweep, ["val/acc1_float"])


def test_a_metric_has_one_direction(write_sweep):
    sweep = read_sweep(write_sweep())
    both = {"val/acc1_truncate_w2": "maximize", "storage/bytes": "minimize"}
    check_goals(sweep, {**both, "val/ppl_float": "minimize", "val/qt_gap_w2": "maximize"})
    check_goals(sweep, {"val/ppl_gap_w2": "maximize", "own": "maximize"})
    for name, wrong, right in (
        ("val/ppl_truncate_mean", "maximize", "lower is better; set goal: minimize"),
        ("train/loss_w2", "maximize", "lower is better; set goal: minimize"),
        ("val/acc1_float", "minimize", "higher is better; set goal: maximize"),
    ):
        with pytest.raises(UserError, match=f"the goal of {name} is {wrong}, but {right}"):
            check_goals(sweep, {name: wrong})


@pytest.mark.parametrize("null", ["None", "null"])
def test_null_teacher_means_no_teacher(parse, null):
    """W&B sends `none` and null of a sweep file as None."""
    assert "train/loss_w8" in logged_metrics(parse([f"--model.teacher={null}"]))


@pytest.mark.parametrize("null", ["None", "null"])
def test_arguments_of_wandb_agents_are_parsed_with_their_types(parse, null):
    """W&B sends str(value): None, True, lists and whole mappings, and YAML's 1e-3 as text."""
    sent = [
        "--model.widths=[8, 4]",
        f"--model.activations={null}",
        "--model.compile=True",
        "--model.lr=1e-3",
        "--model={'ste': 'identity'}",
    ]
    model = parse(sent)["model"]
    assert (model.widths, model.activations, model.compile, model.lr, model.ste) == (
        [8, 4],
        None,
        True,
        1e-3,
        "identity",
    )
    ours = [
        "--model.widths=[8, 4]",
        "--model.activations=null",
        "--model.compile=true",
        "--model.lr=0.001",
        "--model.ste=identity",
    ]
    assert parse(ours)["model"] == model
