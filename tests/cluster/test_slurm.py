"""On SLURM, requeued jobs, arrays and two ranks are bit-identical to an uninterrupted run."""

import time
from pathlib import Path

import pytest
from cluster.conftest import PYTHON
from fixtures.runs import assert_same_run, record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EPOCHS, BATCHES = 2, 20
FIT = " ".join(
    [
        f"{PYTHON} -m tq_lightning fit --trainer.accelerator cpu --trainer.max_epochs {EPOCHS}",
        f"--trainer.limit_train_batches {BATCHES} --trainer.limit_val_batches 1",
        "--model.name resnet8_cifar --model.widths 8,2 --model.calibration_batches 1",
        "--model.ema_decay 0.9 --trainer.accumulate_grad_batches 2",
        "--data.name digits --data.batch_size 8 --ckpt_path auto",
    ]
)


def paced(work: Path, name: str, seconds: float = 0.2) -> str:
    """Return options for a fit that writes its progress to work/name."""
    return (
        "--trainer.callbacks+=fixtures.signals.Pace "
        f"--trainer.callbacks.file={work}/{name} --trainer.callbacks.seconds={seconds}"
    )


def wait_for_batches(slurm, path: Path, count: int, timeout: float = 400) -> None:
    """Wait until a paced fit has started `count` batches, over all its attempts."""
    end = time.monotonic() + timeout
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end, slurm.logs() + logs(path.parent)
        time.sleep(0.1)


def logs(work: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(work.glob("*.log")))


@pytest.fixture(scope="module")
def uninterrupted(slurm, tmp_path_factory):
    """Return seed -> run folder of the uninterrupted fit."""
    work = tmp_path_factory.mktemp("uninterrupted")
    job = slurm.sbatch(work, f"srun {FIT} --seed_everything $SLURM_ARRAY_TASK_ID", "--array=0-1")
    for task in (0, 1):
        assert slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED", logs(work)
    return {task: work / "runs" / f"slurm-{job}_{task}" for task in (0, 1)}


def test_array_tasks_resume_after_a_signal_and_after_scontrol_requeue(
    slurm, uninterrupted, tmp_path
):
    """Each task resumes in its own folder, with the weights of its seed."""
    pace = paced(tmp_path, "batches-$SLURM_ARRAY_TASK_ID")
    fit = f"srun {FIT} --seed_everything $SLURM_ARRAY_TASK_ID {pace}"
    script = f"set -e\n{fit}\necho $SLURM_RESTART_COUNT >> after-$SLURM_ARRAY_TASK_ID"
    job = slurm.sbatch(tmp_path, script, "--array=0-1")
    for task in (0, 1):
        wait_for_batches(slurm, tmp_path / f"batches-{task}", 5)
    slurm.call("scancel", "--signal=USR1", f"{job}_0")
    slurm.call("scontrol", "requeue", f"{job}_1")
    for task in (0, 1):
        run = tmp_path / "runs" / f"slurm-{job}_{task}"
        shown = slurm.wait(f"{job}_{task}")
        assert shown["JobState"] == "COMPLETED", logs(tmp_path)
        assert shown["Restarts"] == "1"
        later = (tmp_path / f"after-{task}").read_text()
        assert later == "1\n", "the first attempt ran no later line of the script"
        assert_same_run(run, uninterrupted[task])
        batches = (tmp_path / f"batches-{task}").read_text().splitlines()
        assert len(batches) - len(set(batches)) <= 1, "it resumed from its checkpoint"
    assert len(list((tmp_path / "runs").iterdir())) == 2
    printed = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "is queued again" in printed and "interrupted: stopped by SIGTERM" in printed
    assert "Traceback" not in printed and "srun` command is available" not in printed
    assert not list(tmp_path.rglob("hpc_ckpt*"))


TWO = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
RANKS = "--trainer.num_nodes 2 --trainer.devices 1 --trainer.strategy ddp"


def test_two_ranks_resume_after_a_signal_and_after_a_lost_node(slurm, tmp_path):
    """The requeued job logs the same losses although its second epoch was interrupted."""
    work = tmp_path / "uninterrupted"
    one = slurm.sbatch(work, f"srun {FIT} {RANKS}", *TWO)
    assert slurm.wait(one)["JobState"] == "COMPLETED", logs(work)
    work = tmp_path / "cut"
    job = slurm.sbatch(work, f"srun {FIT} {RANKS} {paced(work, 'batches')}", *TWO)
    wait_for_batches(slurm, work / "batches", BATCHES + 4)
    slurm.call("scancel", "--signal=USR1", job)
    wait_for_batches(slurm, work / "batches", BATCHES + 9)
    run = work / "runs" / f"slurm-{job}"
    assert record(run)["processes"] == 2
    slurm.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    time.sleep(2)  # it may register again by itself
    slurm.call("scontrol", "update", "nodename=n2", "state=resume", check=False)
    shown = slurm.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "2"), logs(work)
    assert_same_run(run, tmp_path / "uninterrupted" / "runs" / f"slurm-{one}")
    assert list((work / "runs").iterdir()) == [run]


def test_mismatched_tasks_print_one_line_each(slurm, tmp_path):
    fit = FIT.replace("--ckpt_path auto", "")
    commands = [
        f"srun --ntasks-per-node=2 {fit}",
        f"srun --ntasks=1 {fit} --trainer.devices 2",
        fit,
    ]
    script = "\n".join(
        f"timeout 380 {c} > out{i} 2>&1; echo $? > rc{i}" for i, c in enumerate(commands)
    )
    job = slurm.sbatch(tmp_path, script, "--ntasks=2", "--nodes=1")
    assert slurm.wait(job, timeout=1150)["JobState"] == "COMPLETED"
    messages = ("--trainer.devices 2", "srun --nodes 1 --ntasks-per-node 2", "start it with srun")
    for i, message in enumerate(messages):
        out = (tmp_path / f"out{i}").read_text()
        lines = [line for line in out.splitlines() if not line.startswith(("srun: ", "slurmstepd"))]
        assert len(lines) == 1 and message in lines[0] and lines[0].startswith("error: "), out
        assert int((tmp_path / f"rc{i}").read_text()) == 2
    assert not (tmp_path / "runs").exists()


SWEEP = """
name: lr
method: grid
metric: {name: val/acc1_truncate_mean, goal: maximize}
parameters:
  model.lr: {values: [0.1, 0.05, 0.02]}
command: ["${env}", python, -m, tq_lightning, fit, "${args}"]
"""


def test_sweep_under_srun_survives_a_requeue(slurm, tmp_path):
    """Two tasks are two commands that share a study, not two ranks."""
    import optuna

    fixed = FIT.split(" fit ")[1].replace(" --ckpt_path auto", "")
    command = f"{PYTHON} -m tq_lightning sweep lr.yaml --workers 1 --dir sweep -- {fixed}"
    (tmp_path / "lr.yaml").write_text(SWEEP)
    job = slurm.sbatch(
        tmp_path, f"srun {command} --trainer.max_epochs 4", "--ntasks=2", "--nodes=1"
    )
    end = time.monotonic() + 500
    while not list(tmp_path.glob("sweep/trials/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < end, logs(tmp_path)
        time.sleep(0.2)
    slurm.call("scancel", "--signal=USR1", job)
    shown = slurm.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), logs(tmp_path)
    study = optuna.load_study(study_name="lr", storage=f"sqlite:///{tmp_path}/sweep/study.db")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 3
    causes = {t.user_attrs["cause"] for t in study.trials if t.state.name == "FAIL"}
    assert causes == {"interrupted"}
    assert any("resumed_step" in t.user_attrs for t in study.trials if t.state.name == "COMPLETE")
