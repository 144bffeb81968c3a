"""A SLURM cluster of two nodes on this machine, started and stopped by these tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
ROOT = Path(__file__).parents[2]

CONF = """
ClusterName=tq
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
AuthInfo=cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MinJobAge=3600
KillWait=10
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=1
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{nodes}] CPUs=2 RealMemory=4000
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE
"""


def free_ports() -> tuple[int, int, int]:
    """Return the first of three consecutive free ports."""
    for first in range(17001, 30000, 7):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first, first + 1, first + 2
        except OSError:
            continue
    raise AssertionError("no free ports")


class Slurm:
    """Commands of a running SLURM. Jobs run this checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # jobs must not inherit variables of an outer job or launcher
        outer = ("SLURM", "TORCHELASTIC")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(outer)} | {
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "127.0.0.1",  # the node names are not host names
        }

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, (command, done.stderr)
        return done.stdout

    def sbatch(self, work: Path, script: str, *options: str) -> str:
        """Submit a bash script that runs in `work`. Return the job id."""
        work.mkdir(parents=True, exist_ok=True)
        path = work / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        flags = [f"--chdir={work}", f"--output={work}/%x-%A_%a.log", "--open-mode=append"]
        return self.call("sbatch", "--parsable", *flags, *options, str(path)).strip()

    def job(self, job: str) -> dict[str, str]:
        shown = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in shown if "=" in field)

    def wait(self, job: str, *states: str, timeout: float = 600) -> dict[str, str]:
        """Wait until a job is in one of `states`; by default, until it has ended."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            shown = self.job(job)
            if shown["JobState"] in states:
                return shown
            time.sleep(0.5)
        raise AssertionError(f"job {job} is not {states}: {shown}\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(p.read_text()[-2000:] for p in sorted(self.folder.rglob("*.log")))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        reason = f"needs {', '.join(missing)}" if missing else "needs to be root"
        assert "TQ_REQUIRE_SLURM" not in os.environ, reason
        pytest.skip(f"{reason} (Debian: apt-get install slurmctld slurmd slurm-client munge)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "n1", "n2", "log"):
        (folder / name).mkdir()
    slurm = Slurm(folder)
    port, first, second = free_ports()
    conf = CONF.format(folder=folder, port=port, nodes=f"{first}-{second}")
    (folder / "slurm.conf").write_text(conf)
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "/run/munge"], check=True)
    munge = ["runuser", "-u", "munge", "--", "munged"]
    own = subprocess.run(munge, capture_output=True).returncode == 0  # one may be running already
    try:
        slurm.call("slurmctld")
        for node in ("n1", "n2"):
            slurm.call("slurmd", "-N", node)
        end = time.monotonic() + 60
        while "2 idle" not in " ".join(
            slurm.call("sinfo", "-h", "-o", "%D %T", check=False).split()
        ):
            assert time.monotonic() < end, slurm.logs()
            time.sleep(0.2)
        yield slurm
    finally:
        slurm.call("scancel", "--full", "-u", "root", check=False)
        end = time.monotonic() + 30
        while slurm.call("squeue", "-h", check=False).strip() and time.monotonic() < end:
            time.sleep(0.2)
        pids = [int(path.read_text()) for path in folder.glob("*.pid")]
        slurm.call("scontrol", "shutdown", check=False)
        end = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in pids:  # a daemon with a job that hangs
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if own:
            subprocess.run([*munge, "--stop"], capture_output=True)


PYTHON = sys.executable
