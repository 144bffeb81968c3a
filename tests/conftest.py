"""Fixtures of the whole suite: nothing phones home, nothing draws threads it was not given."""

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
