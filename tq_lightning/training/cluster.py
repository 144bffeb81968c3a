"""SLURM and torchrun: compare the processes of a launcher with the Trainer, and requeue a job."""

import os
import shutil
import subprocess

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from tq_lightning.errors import UserError


def under_srun() -> bool:
    """Return True if `srun` started this process; only its processes have a step id."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ


def slurm_job() -> tuple[str | None, int]:
    """Return the id and restart count of the SLURM job; the id of an array task is ARRAY_TASK.

    A requeued job keeps its id. SLURM_JOB_ID is not used for arrays: in one of the tasks it is the
    id of the array, and `scontrol requeue` would requeue every task.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    return job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def requeue() -> str | None:
    """Requeue this SLURM job. Return None, or the reason if SLURM did not requeue it."""
    job, _ = slurm_job()
    if job is None:
        return "not a SLURM job"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())


class SrunEnvironment(SLURMEnvironment):
    """The tasks of an `srun` step, from the variables of the step.

    Lightning's class reads the variables of the job, which differ for a smaller step, and requeues
    with a checkpoint that any later fit in the same root would load.
    """

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_used() -> None:
        """Do nothing: this environment is used only under srun."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """Do nothing: `check_tasks` compares the step with the Trainer."""

    def world_size(self) -> int:
        """Return the number of tasks of the step."""
        return int(os.environ["SLURM_STEP_NUM_TASKS"])

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Do nothing: `check_tasks` validates the settings, also of a single process."""


def cluster_environment() -> ClusterEnvironment | None:
    """Return the plugin of this process's launcher; None lets Lightning choose (LSF, MPI)."""
    if TorchElasticEnvironment.detect():  # before SLURM, because torchrun may run in a SLURM job
        return TorchElasticEnvironment()
    if under_srun():
        return SrunEnvironment()
    if "SLURM_JOB_ID" in os.environ or shutil.which("srun"):
        return LightningEnvironment()
    return None


def check_tasks(devices: int, nodes: int, fit: bool) -> None:
    """Compare the processes that a launcher started with those that the Trainer expects.

    Too few processes would wait for the missing ones, and too many would train several runs.

    Args:
        devices: devices of the Trainer on each node.
        nodes: nodes of the Trainer.
        fit: True for a fit, which needs `srun` in a job of several tasks.

    Raises:
        UserError: the numbers differ. The message is empty on all ranks except the first.
    """
    if TorchElasticEnvironment.detect():
        rank, tasks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", tasks))
        started = f"torchrun started {_count(tasks, local)}"
        command = f"torchrun --nnodes {nodes} --nproc_per_node {devices}"
    elif under_srun():
        rank, tasks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
        each = tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
        if len(set(each)) > 1:
            _refuse(rank, f"srun started {each} tasks on the nodes; pass srun --ntasks-per-node")
        local = each[0]
        started = f"srun started {_count(tasks, local)}"
        command = f"srun --nodes {nodes} --ntasks-per-node {devices}"
    else:
        tasks = int(os.environ.get("SLURM_NTASKS") or 1)
        if fit and tasks > 1 and "SLURM_JOB_ID" in os.environ and devices * nodes == 1:
            raise UserError(
                f"the SLURM job has {tasks} tasks, but this is one process; start it with srun, "
                "or pass sbatch --ntasks 1"
            )
        if nodes > 1 and "SLURM_JOB_ID" in os.environ:
            raise UserError(
                f"trainer.num_nodes={nodes}, but this is one process; start it with "
                f"srun --nodes {nodes} --ntasks-per-node {devices}"
            )
        return
    if (tasks, local) != (devices * nodes, devices):
        _refuse(
            rank,
            f"{started}, but trainer.devices={devices} and trainer.num_nodes={nodes}; "
            f"pass --trainer.devices {local} --trainer.num_nodes {max(1, tasks // local)}, "
            f"or start it with {command}",
        )


def _count(tasks: int, local: int) -> str:
    where = f", {local} on each node" if local != tasks else ""
    return f"{tasks} process{'es' if tasks > 1 else ''}{where}"


def _refuse(rank: int, message: str) -> None:
    raise UserError(message if rank == 0 else "")


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's list of task counts: "2(x3),1" -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts
