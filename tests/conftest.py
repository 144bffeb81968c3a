"""Fixtures of the whole suite: no network access, and one thread per process."""

import os
import signal
import sys

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def own_rendezvous():
    """Remove a process group and its port, which Lightning leaves in the process."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def interruptible():
    """Raise KeyboardInterrupt on SIGINT, which a shell ignores in a background process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
