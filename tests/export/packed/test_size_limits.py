"""Small files with valid checksums and huge networks are rejected quickly in little memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fixtures.packed import resign, set_in
from torch import nn

from tq_lightning import load_packed
from tq_lightning.errors import UserError
from tq_lightning.export.packed.size_limits import LimitResultSizes, SizeLimits


def network(name, **args):
    """Return a header with another network and the largest possible number of norm tensors."""

    def change(metadata, index, content):
        content["model"] = {"name": name, "args": args}
        content["norms"] += [{"name": f"{n:x}", "shape": []} for n in range(2600)]

    return change


def dimensions(where, key):
    def change(metadata, index, content):
        content[where][0][key] = [1] * 60_000

    return change


def skips(metadata, index, content):
    content["prepare"]["skip"] = ["first"] * 20_000


def preprocessing(**options):
    def change(metadata, index, content):
        content["preprocessing"] = {**(content["preprocessing"] or {}), **options}

    return change


def duplicates(metadata, index, content):
    content["norms"] += content["norms"]


def planes(metadata, index, content):
    content["codes"], content["compression"] = 1 << 40, "zstd-xor0"


BY_FILE, BY_NETWORK = "is damaged", "many times larger than its file"
HUGE = {
    "norm widths": (set_in("content", "norm_widths", [1] * 30_000), BY_FILE),
    "dimensions of a layer": (dimensions("layers", "shape"), BY_FILE),
    "dimensions of a scale": (dimensions("layers", "scale"), BY_FILE),
    "dimensions of a norm": (dimensions("norms", "shape"), BY_FILE),
    "norms twice": (duplicates, BY_FILE),
    "codes": (planes, BY_FILE),
    "skip patterns": (skips, "20000 skip patterns"),
    "depth": (network("vit_tiny_patch16_224", depth=65536), BY_NETWORK),
    "thin": (network("convnext_atto", depths=[10000] * 4, dims=[1] * 4), BY_NETWORK),
    "window": (
        network("swin_tiny_patch4_window7_224", img_size=4096, window_size=32),
        BY_NETWORK,
    ),
    "Python loops over a window": (
        network("tiny_vit_5m_224", window_sizes=[7, 7, 33, 7]),
        "disallowed model argument in the file header: 'window_sizes'",
    ),
    "input": (preprocessing(input_size=[3, 4096, 4096]), BY_FILE),
    "means": (preprocessing(mean=[0.5] * 1000), BY_FILE),
    "division by zero": (preprocessing(std=[0, 1, 1]), BY_FILE),
    "resized input": (preprocessing(crop_pct=1e-4), BY_FILE),
    "another network": (
        network("vit_tiny_patch16_224", depth=500, embed_dim=3, num_heads=1),
        "lacks",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "match"), HUGE.values(), ids=HUGE.keys())
def test_huge_headers_are_rejected_quickly(change, match, packed, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(resign(packed.read_bytes(), change))
    assert path.stat().st_size < 400_000
    import timm  # noqa: F401  its import is not part of the measurement

    start = time.process_time()
    with pytest.raises(UserError, match=match) as caught:
        load_packed(path)
    assert time.process_time() - start < 20  # at most 4 s on a quiet machine
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not nn.modules.module._global_parameter_registration_hooks
    assert not nn.modules.module._global_module_registration_hooks


PEAK = """
import resource, sys
from tq_lightning import load_packed
from tq_lightning.errors import UserError

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20

load_packed(sys.argv[1])  # the imports are not part of the measurement
last = peak()
for path in sys.argv[2:]:
    try:
        load_packed(path)
    except UserError:
        print(path, peak() - last)  # in MiB
        last = peak()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_huge_headers_are_rejected_in_little_memory(packed, tmp_path):
    pytest.importorskip("resource", reason="not on Windows")
    for number, (change, _) in enumerate(HUGE.values()):
        (tmp_path / str(number)).write_bytes(resign(packed.read_bytes(), change))
    paths = [packed, *(tmp_path / str(number) for number in range(len(HUGE)))]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    rises = {path: int(rise) for path, rise in map(str.split, done.stdout.splitlines())}
    assert len(rises) == len(HUGE), "a file was not rejected"
    assert sum(rises.values()) < 300, dict(zip(HUGE, rises.values(), strict=True))


@pytest.mark.slow
def test_values_are_rejected_before_they_are_allocated():
    """A constructor that computes with values could allocate terabytes."""
    with pytest.raises(UserError, match=BY_NETWORK), LimitResultSizes(SizeLimits(10, 1000)):
        torch.zeros(1 << 44)
    rows = torch.arange(1 << 20)
    with pytest.raises(UserError, match=BY_NETWORK), LimitResultSizes(SizeLimits(10, 1000)):
        rows[:, None] - rows[None, :]
    with LimitResultSizes(SizeLimits(10, 1000)):
        layer = nn.Linear(100, 100)
        assert layer.weight.mul(2).view(-1)[0].item() == 2 * layer.weight[0, 0].item()
    with pytest.raises(UserError, match=BY_NETWORK), LimitResultSizes(SizeLimits(10, 1000)):
        while True:
            rows.add_(1)
