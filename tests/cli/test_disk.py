"""A full or read-only disk is one line and status 2 for every verb, and leaves nothing behind.

The disks are real: small file systems in memory, which only root may mount.
"""

import subprocess
from pathlib import Path

import pytest
from fixtures.packed import net, packed  # noqa: F401
from fixtures.records import pair, write
from fixtures.runs import last, record
from PIL import Image

from tq_lightning.cli import main

FIT = [
    *("--model.widths", "8,2", "--model.calibration_batches", "1", "--data.name", "digits"),
    *("--data.batch_size", "16", "--trainer.accelerator", "cpu"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
]  # fmt: skip
SWEEP = """
method: grid
metric: {name: val/acc1_truncate_mean, goal: maximize}
parameters:
  model.lr: {values: [0.1]}
command: ["${env}", python, -m, tq_lightning, fit, "${args}"]
"""


def mount(at: Path, options: str) -> None:
    at.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount ({error})")
    if done.returncode:
        pytest.skip(f"may not mount a file system ({done.stderr.strip()})")


def fill(disk: Path, free: int = 0) -> None:
    """Leave `free` bytes on a disk of 2 MiB."""
    (disk / "ballast").unlink(missing_ok=True)
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())
    with (disk / "ballast").open("wb") as file:
        file.write(b"x" * (2**21 - used - free))


@pytest.fixture(params=["ro", "size=2m"], ids=["read-only", "full"])
def disk(request, tmp_path):
    at = tmp_path / "disk"
    mount(at, request.param)
    if request.param != "ro":
        fill(at)
    yield at
    subprocess.run(["umount", "--lazy", str(at)], check=True)


def line_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and "Traceback" not in err
    return line


def test_full_disk_is_an_error_for_every_output_file(disk, packed, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    runs = write(tmp_path / "runs", *pair(seeds=(0, 1)))
    before = sorted(disk.rglob("*"))
    for argv in (
        ("report", runs, "--out", disk / "report"),
        ("export", packed, "--out", disk / "m.safetensors"),
        ("export", packed, "--out", tmp_path / "m", "--max-bits", 2, "--rest", disk / "rest"),
        ("inspect", "--model.name", "resnet8_cifar", "--out", disk / "i.json"),
        ("classify", packed, tmp_path / "a.png", "--out", disk / "c.csv"),
    ):
        assert f"cannot write {disk}" in line_of(capsys, *argv)
        assert sorted(disk.rglob("*")) == before
    assert not (tmp_path / "m").exists()


def test_full_disk_is_an_error_for_runs_and_sweeps(disk, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(SWEEP)
    end = ("--trainer.max_epochs", 1)
    sweep = ("sweep", tmp_path / "s.yaml", "--workers", 0)
    before = sorted(disk.rglob("*"))
    for argv in (
        ("fit", *FIT, *end, "--run_dir", disk / "deep" / "run"),
        ("fit", *FIT, *end, "--trainer.default_root_dir", disk),
        (*sweep, "--dir", disk / "sweep", "--", *FIT, *end),
        (*sweep, "--dir", tmp_path / "s", "--storage", f"sqlite:///{disk}/s.db", "--", *FIT, *end),
    ):
        assert str(disk) in line_of(capsys, *argv)
        assert sorted(disk.rglob("*")) == before, argv
    assert not (tmp_path / "s").exists()


def test_sweep_without_space_for_its_database_leaves_no_files(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(SWEEP)
    disk = tmp_path / "disk"
    mount(disk, "size=2m")
    try:
        fill(disk, free=40_000)  # the database is begun, and does not fit
        sweep = ("sweep", tmp_path / "s.yaml", "--workers", 0, "--dir", disk / "sweep", "--")
        assert "full" in line_of(capsys, *sweep, *FIT, "--trainer.max_epochs", 1)
        assert [path.name for path in disk.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_disk_that_fills_up_during_a_fit_keeps_the_old_checkpoint(tmp_path, capsys):
    """Resuming, testing and predicting too; the old checkpoint stays and resumes later."""
    disk = tmp_path / "disk"
    mount(disk, "size=2m")
    try:
        run = disk / "run"
        common = ("--run_dir", run, "--ckpt_path", "last")
        assert main(["fit", *FIT, "--trainer.max_epochs", "1", "--run_dir", str(run)]) == 0
        fill(disk, free=60_000)  # enough for the small files, too little for a checkpoint
        capsys.readouterr()
        resume = ["fit", *map(str, (*FIT, *common)), "--trainer.max_epochs", "2"]
        assert main(resume) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: cannot write ") and err.count("\n") == 1
        assert "checkpoints/" in err and "No space left on device" in err
        assert record(run)["status"] == "failed" and last(run)["global_step"] == 2
        fill(disk)
        for verb in ("test", "predict"):
            assert "No space left on device" in line_of(capsys, verb, *FIT, *common)
        left = [path.name for path in run.rglob("*") if path.name.startswith(".")]
        assert left == []
        (disk / "ballast").unlink()
        larger = ["mount", "-o", "remount,size=16m", str(disk)]
        subprocess.run(larger, check=True)
        assert main(resume) == 0
        assert record(run)["status"] == "finished" and last(run)["global_step"] == 4
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
