"""Integer layers on this processor and on an emulated one without VNNI, against exact integers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tq_lightning.quant.codes import LEVELS
from tq_lightning.quant.integer.kernels import missing_kernels
from tq_lightning.quant.integer.saturation import activation_top

pytestmark = pytest.mark.skipif(missing_kernels() is not None, reason=str(missing_kernels()))
SCRIPT = Path(__file__).with_name("on_this_processor.py")
KEYS = [f"{level} {bits}" for level in LEVELS for bits in range(1, 9)]
SATURATING = {key for key in KEYS if activation_top(int(key[-1]), key.split()[0], False) == 127}
QEMU = shutil.which("qemu-x86_64")


def run_on_processor(*prefix):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [*prefix, sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_widths_are_exact_on_this_processor():
    found = run_on_processor()
    assert found["allowed"] == dict.fromkeys(KEYS, 0)
    if found["exact"]:
        assert found["forced"] == dict.fromkeys(KEYS, 0)


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
def test_all_widths_are_exact_without_vnni():
    """With 8-bit activation codes, exactly the widths that can saturate are wrong."""
    found = run_on_processor(QEMU, "-cpu", "Haswell")
    assert not found["exact"]
    assert found["allowed"] == dict.fromkeys(KEYS, 0)
    assert {key for key, count in found["forced"].items() if count} == SATURATING
