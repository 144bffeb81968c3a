"""The command of a sweep file: what is taken from it, and what is refused."""

import pytest

from tq_lightning.errors import UserError
from tq_lightning.sweep.config import read_sweep

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
