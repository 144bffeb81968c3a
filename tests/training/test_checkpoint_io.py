"""Checkpoints are written atomically for any TMPDIR, and damaged ones are detected."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tq_lightning.cli import main
from tq_lightning.errors import UserError
from tq_lightning.training.checkpoint_io import AtomicCheckpointIO, verify_checkpoint

CHECKPOINT = {"state_dict": {"w": torch.arange(5000.0), "b": torch.ones(3)}, "global_step": 7}
CODE = """
import sys, time, torch
from pathlib import Path
from tq_lightning.training.checkpoint_io import AtomicCheckpointIO
path = Path(sys.argv[1])
real = Path.open
class Slow:
    def __init__(self, file): self.file = file
    def __enter__(self): self.file.__enter__(); return self
    def __exit__(self, *error): return self.file.__exit__(*error)
    def write(self, part):
        self.file.write(bytes(part)[:4000]); self.file.flush(); time.sleep(60)
def slow_open(self, mode="r", **how):
    return Slow(real(self, mode, **how)) if "w" in mode else real(self, mode, **how)
Path.open = slow_open
AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(5000)}, path)
"""


def save(path):
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    return path


def test_checkpoint_loads_with_and_without_this_class(tmp_path):
    path = save(tmp_path / "new" / "last.ckpt")
    for loaded in (
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True),
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
    ):
        assert torch.equal(loaded["state_dict"]["w"], CHECKPOINT["state_dict"]["w"])
        assert loaded["global_step"] == 7
    assert list(path.parent.iterdir()) == [path]


def test_checkpoint_without_checksum_is_accepted(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "old.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt", weights_only=True)


def test_any_flipped_byte_is_detected(tmp_path):
    path = save(tmp_path / "last.ckpt")
    whole = path.read_bytes()
    places = [0, 1, 30, 100, *range(200, len(whole), 997), *range(len(whole) - 45, len(whole))]
    for place in places:
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :],
        )
        with pytest.raises(UserError) as caught:
            verify_checkpoint(path)
        assert str(caught.value).startswith(f"checkpoint {path} is damaged (wrong checksum); pass")
    path.write_bytes(whole)
    verify_checkpoint(path)


def test_missing_checkpoint_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        verify_checkpoint(tmp_path / "absent.ckpt")


@pytest.mark.slow
def test_killed_writer_keeps_the_old_checkpoint(tmp_path):
    """The temporary folder may be on another file system, because it is not used."""
    path, elsewhere = save(tmp_path / "run" / "last.ckpt"), Path("/dev/shm")
    temporary = str(elsewhere if elsewhere.is_dir() else tmp_path)
    before = path.read_bytes()
    environment = {**os.environ, "TMPDIR": temporary}
    writer = subprocess.Popen([sys.executable, "-c", CODE, str(path)], env=environment)
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list(path.parent.iterdir())) < 2:
        assert writer.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    (half,) = (p for p in path.parent.iterdir() if p != path)
    writer.kill()
    writer.wait()
    assert 0 < half.stat().st_size < len(before) and path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = save(tmp_path / "last.ckpt")
    before, real = path.read_bytes(), Path.open

    def full(self, mode="r", **how):
        return real(Path("/dev/full") if "w" in mode else self, mode, **how)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt \(No space left on device\)"):
        save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("verb", ["fit", "test", "export", "start weights"])
def test_damaged_checkpoint_is_an_error_of_one_line_on_the_command_line(tmp_path, capsys, verb):
    path = save(tmp_path / "run" / "checkpoints" / "last.ckpt")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    out = ("--out", str(tmp_path / "out.safetensors"))
    given = [str(path), *out] if verb == "export" else ["--ckpt_path", str(path)]
    given += ["--trainer.max_epochs", "1"] if verb == "fit" else []
    if verb == "start weights":
        verb, given = "fit", ["--model.checkpoint_path", str(path), "--trainer.max_epochs", "1"]
        given += [
            "--model.name",
            "resnet8_cifar",
            "--trainer.default_root_dir",
            str(tmp_path / "r"),
        ]
    assert main([verb, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "is damaged (wrong checksum)" in error
