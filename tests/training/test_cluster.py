"""The processes of a launcher must match the devices and nodes of the Trainer."""

import os
import subprocess
import sys

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from tq_lightning.errors import UserError
from tq_lightning.training.cluster import (
    SrunEnvironment,
    check_tasks,
    cluster_environment,
    slurm_job,
    tasks_per_node,
)

LAUNCHERS = ("SLURM", "TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_")


@pytest.fixture
def launched(monkeypatch):
    """Return a function that sets variables of a launcher. All others are removed."""
    for key in [key for key in os.environ if key.startswith(LAUNCHERS)]:
        monkeypatch.delenv(key)

    def set_variables(**variables):
        for key, value in variables.items():
            monkeypatch.setenv(key, str(value))

    return set_variables


def srun(tasks, per_node, rank=0, **more):
    step = {"STEP_ID": 0, "PROCID": rank, "STEP_NUM_TASKS": tasks, "STEP_TASKS_PER_NODE": per_node}
    return {f"SLURM_{key}": value for key, value in {"JOB_ID": 1, **step, **more}.items()}


def torchrun(tasks, local, rank=0):
    names = {"RANK": rank, "WORLD_SIZE": tasks, "LOCAL_WORLD_SIZE": local, "LOCAL_RANK": 0}
    return {**names, "TORCHELASTIC_RUN_ID": "none"}


BATCH = {"SLURM_JOB_ID": 1, "SLURM_PROCID": 0}  # a command in a batch script


@pytest.mark.parametrize(
    ("variables", "devices", "nodes"),
    [
        ({}, 2, 1),
        ({}, 1, 1),
        (srun(1, "1"), 1, 1),
        (srun(2, "2"), 2, 1),
        (srun(2, "1(x2)"), 1, 2),
        (srun(1, "1", NTASKS_PER_NODE=2, NTASKS=2), 1, 1),  # a small job step of a larger job
        (torchrun(2, 2), 2, 1),
        (torchrun(4, 2), 2, 2),
        (BATCH, 2, 1),  # Lightning starts the second process
        (BATCH | {"SLURM_NTASKS": 2}, 2, 1),
    ],
)
def test_matching_number_of_processes_is_accepted(launched, variables, devices, nodes):
    launched(**variables)
    check_tasks(devices, nodes, fit=True)


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "message"),
    [
        (torchrun(2, 2), 1, 1, "torchrun started 2 processes.*pass --trainer.devices 2"),
        (torchrun(1, 1), 2, 1, "torchrun --nnodes 1 --nproc_per_node 2"),
        (srun(2, "2"), 1, 1, "srun started 2 processes.*pass --trainer.devices 2"),
        (srun(1, "1"), 2, 1, "srun started 1 process,.*srun --nodes 1 --ntasks-per-node 2"),
        (srun(2, "1(x2)"), 1, 1, "--trainer.devices 1 --trainer.num_nodes 2"),
        (srun(2, "1(x2)"), 2, 1, "--trainer.devices 1 --trainer.num_nodes 2"),
        (srun(3, "2,1"), 3, 1, "--ntasks-per-node"),
        (BATCH | {"SLURM_NTASKS": 2}, 1, 1, "start it with srun, or pass sbatch --ntasks 1"),
        (BATCH, 1, 2, "srun --nodes 2 --ntasks-per-node 1"),
    ],
)
def test_mismatch_is_reported_by_rank_zero_in_one_line(
    launched, variables, devices, nodes, message
):
    launched(**variables)
    with pytest.raises(UserError, match=message) as error:
        check_tasks(devices, nodes, fit=True)
    assert "\n" not in str(error.value)
    for key in ("RANK", "SLURM_PROCID"):
        if key in variables and "SLURM_NTASKS" not in variables and nodes == 1:
            launched(**{key: 1})
            with pytest.raises(UserError, match=r"^$"):
                check_tasks(devices, nodes, fit=True)


def test_evaluation_in_a_larger_job_runs_in_one_process(launched):
    launched(**BATCH, SLURM_NTASKS=2)
    check_tasks(1, 1, fit=False)


def test_cluster_environment_matches_the_launcher(launched, monkeypatch, recwarn):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert cluster_environment() is None
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert type(cluster_environment()) is LightningEnvironment
    launched(**srun(4, "2(x2)", rank=3), SLURM_LOCALID=1, SLURM_NODEID=1, SLURM_NTASKS=8)
    environment = cluster_environment()
    assert type(environment) is SrunEnvironment and not environment.auto_requeue
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    launched(**torchrun(2, 2))
    assert type(cluster_environment()) is TorchElasticEnvironment
    assert not recwarn.list


def test_job_names_survive_a_requeue(launched):
    assert slurm_job() == (None, 0)
    launched(SLURM_JOB_ID=12, SLURM_RESTART_COUNT=2)
    assert slurm_job() == ("12", 2)
    launched(SLURM_ARRAY_JOB_ID=10, SLURM_ARRAY_TASK_ID=0)
    assert slurm_job() == ("10_0", 2)


def test_tasks_per_node_is_parsed():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_mismatch_is_an_error_of_one_line(tmp_path):
    """Two processes without --trainer.devices 2 neither start two runs nor wait."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    fit = ["-m", "tq_lightning", "fit", "--data.name", "digits", "--trainer.max_epochs", "1"]
    root = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, *torchrun, *fit, *root],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "torchrun started 2 processes" in lines[0], done.stderr
    assert "pass --trainer.devices 2" in lines[0] and done.returncode != 0
    assert not (tmp_path / "runs").exists()
