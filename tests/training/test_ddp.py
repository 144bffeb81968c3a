"""Two processes with half the batch each train like one process. Only the first writes files."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.slow

VIT = "{img_size: 8, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}"
# a sandwich with norms per width: in every step some parameters get no gradient and
# must not change
ARGUMENTS = [
    *(
        "--model.name",
        "vit_tiny_patch16_224",
        "--model.model_args",
        VIT,
        "--model.norm",
        "per_width_all",
    ),
    *(
        "--model.widths",
        "8,6,4,2,1",
        "--model.width_schedule",
        "sandwich",
        "--model.momentum",
        "0.9",
        "--model.lr",
        "0.1",
    ),
    *(
        "--model.weight_decay",
        "0.1",
        "--data.name",
        "digits",
        "--data.pad",
        "0",
        "--data.eval_batch_size",
        "180",
    ),
    *(
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "6",
        "--trainer.accelerator",
        "cpu",
    ),
    *("--trainer.enable_model_summary", "false"),
]


def finish(
    root: Path, batch: int, before: tuple[str, ...] = ("-m",), *more: str
) -> tuple[Path, dict]:
    command = [
        sys.executable,
        *before,
        "tq_lightning",
        "fit",
        *ARGUMENTS,
        "--data.batch_size",
        str(batch),
    ]
    command += ["--trainer.default_root_dir", str(root), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = root.iterdir()
    return run, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_close(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(
            value, two[key], rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.timeout(3600)
def test_two_processes_train_like_one_with_both_launchers(tmp_path):
    one_run, one = finish(tmp_path / "one", 32)
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    lightning_run, two = finish(tmp_path / "two", 16, ("-m",), *ddp)
    torchrun_run, three = finish(tmp_path / "three", 16, torchrun, *ddp)
    _, other = finish(tmp_path / "other", 16)
    assert_close(two["state_dict"], one["state_dict"])
    assert_close(three["state_dict"], one["state_dict"])
    with pytest.raises(AssertionError):  # counter-example: half the batch
        assert_close(other["state_dict"], one["state_dict"])
    buffers = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, two)]
    assert buffers[0].keys() == buffers[1].keys(), "momentum only where there was a gradient"
    records = [
        json.loads((run / "record.json").read_text())
        for run in (one_run, lightning_run, torchrun_run)
    ]
    assert [record["processes"] for record in records] == [1, 2, 2]
    for record in records:
        assert record["status"] == "finished" and record["steps"] == 6
        for key, value in records[0]["last"]["metrics"].items():
            if key == "train/images_per_second":  # an independent measurement
                continue
            near = 1.0 if "acc" in key or "gap" in key else 1e-3
            assert record["last"]["metrics"][key] == pytest.approx(value, abs=near), key
        assert (
            record["last"]["metrics"]["val/images"] == records[0]["last"]["metrics"]["val/images"]
        )


class Freeze(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        for m in pl_module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()


class Count(L.Callback):
    """Count reductions with a communication hook; a small model is one bucket."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, pl_module):
        def hook(state, bucket):
            with self.path.open("a") as file:
                file.write(f"{trainer.global_rank} {bucket.buffer().numel()}\n")
            size = torch.distributed.get_world_size()
            work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return work.then(lambda f: f.value()[0].div_(size))

        trainer.strategy.model.register_comm_hook(None, hook)


def in_fresh_process(test):
    """Run a test in a new pytest process, because autograd threads prevent forking workers."""

    @functools.wraps(test)
    def wrapped(train, resnet, tmp_path):
        if os.environ.get("TQ_FRESH_PROCESS"):
            return test(train, resnet, tmp_path)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"{__file__}::{test.__name__}",
        ]
        env = {**os.environ, "TQ_FRESH_PROCESS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:]

    return wrapped


@pytest.mark.timeout(900)
@in_fresh_process
def test_step_has_one_reduction_and_frozen_statistics_stay(train, resnet, tmp_path):
    resnet = {**resnet, "num_classes": 10}
    two_processes = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    flags = {"limit_train_batches": 3, "limit_val_batches": 0}
    count = Count(tmp_path / "count")  # fork before autograd has run in this process
    _, two = train(
        tmp_path / "two",
        resnet,
        {"batch_size": 8},
        callbacks=[Freeze(), count],
        **two_processes,
        **flags,
    )
    _, one = train(tmp_path / "one", resnet, {"batch_size": 16}, callbacks=[Freeze()], **flags)
    assert_close(
        dict(two.state_dict()), dict(one.state_dict())
    )  # the forked process returns the weights to this one
    lines = (tmp_path / "count").read_text().splitlines()
    assert len(lines) == 2 * 3, f"one reduction a step and process, not one a width: {lines}"


@pytest.mark.timeout(900)
@in_fresh_process
def test_accumulation_reduces_once_per_update(train, resnet, tmp_path):
    count = Count(tmp_path / "count")
    flags = {"devices": 2, "strategy": "ddp_fork", "limit_train_batches": 4, "limit_val_batches": 0}
    train(tmp_path, data={"batch_size": 8}, callbacks=[count], accumulate_grad_batches=2, **flags)
    assert len((tmp_path / "count").read_text().splitlines()) == 2 * 2
