"""A killed worker with PostgreSQL: a server on loopback with its own data directory."""

import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from worker_pool_helpers import check_killed_worker

BINARIES = next(iter(sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)), None)


@pytest.fixture(scope="module")
def postgres():
    """Return the URL of a new database. As root, the server runs as the user postgres."""
    initdb = str(Path(BINARIES) / "initdb") if BINARIES else shutil.which("initdb")
    if initdb is None:
        pytest.skip("needs PostgreSQL (Debian: apt-get install postgresql)")
    base = Path(
        tempfile.mkdtemp(prefix="tq-postgres-", dir="/tmp")
    )  # short: the socket's path may have 107 bytes
    drop = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(base, user.pw_uid, user.pw_gid)
        drop = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, tools = base / "data", Path(initdb).parent
    run = {"check": True, "capture_output": True, "cwd": base, **drop}
    subprocess.run([initdb, "-D", data, "-A", "trust", "-U", "me", "--no-sync"], **run)
    options = f"-p {port} -k {base} -c listen_addresses=127.0.0.1 -c fsync=off"
    subprocess.run(
        [
            tools / "pg_ctl",
            "-D",
            data,
            "-w",
            "-t",
            "120",
            "-l",
            base / "log",
            "-o",
            options,
            "start",
        ],
        **(run | {"capture_output": False}),
    )
    try:
        yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([tools / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop"], **run)
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_worker_loses_no_result_and_repeats_no_trial(
    postgres, write_sweep, tmp_path, sweep_process
):
    check_killed_worker(write_sweep, tmp_path, sweep_process, postgres)
