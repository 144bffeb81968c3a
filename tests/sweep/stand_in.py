"""Stand-ins for `fit` that write a record.json like a real run, within milliseconds."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tq_lightning.records import Evaluation, ModelBytes, Record, write_record

METRIC = "val/acc1_truncate_mean"
CHECKPOINT = {  # without global_step
    "state_dict": {},
    "hyper_parameters": {},
    "loops": {
        "fit_loop": {
            "epoch_progress": {"current": {"processed": 0}},
            "epoch_loop.batch_progress": {"is_last_batch": True, "current": {"ready": 1}},
            "state_dict": {},
        }
    },
}


def fit(argv: list[str]) -> dict[str, Any]:
    """Log val/acc1_truncate_mean = 50 + 10 lr - seed, and record process and arguments.

    --sleep=S takes S seconds; --end=HOW ends it in that way.
    """
    given = dict(word.removeprefix("--").split("=", 1) for word in argv if "=" in word)
    root = Path(given["trainer.default_root_dir"])
    lr, seed = float(given.get("model.lr", 0)), int(given.get("seed_everything", 0))
    with (root.parent / "ran.txt").open("a") as file:
        file.write(f"{os.getpid()} {lr:g} {seed} {time.time()}\n")
    end = given.get("end", "")
    run = root / "run"
    run.mkdir(parents=True, exist_ok=True)
    time.sleep(float(given.get("sleep", 0)))
    if end == "raise":
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2.00 GiB")
    if end == "cuda":
        raise RuntimeError(
            "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"
        )
    if end == "exit":
        raise SystemExit(3)
    if end == "kill":
        os.kill(os.getpid(), 9)
    value = 50 + 10 * lr - seed
    metrics = {
        METRIC: value,
        "train/loss_w2": float("nan") if end == "nan" else 0.5,
        "val/acc1_truncate_w2": value - 10 * lr * lr,
    }
    if end == "unlogged":
        del metrics[METRIC]
    record = Record(
        id=run.name,
        status="finished",
        config={},
        last=Evaluation(metrics, 0),
        bytes=ModelBytes(packed=1000 + int(100 * lr)),
    )
    write_record(run / "record.json", record)
    return {**metrics, "record": str(run / "record.json")}


def fit_epochs(argv: list[str]) -> dict[str, Any]:
    """Run --epochs=N of --sleep=S seconds, each with a row of metrics.csv and a last.ckpt.

    It resumes from --ckpt_path. --stop=K interrupts each call after K epochs of its own.
    """
    import torch

    given = dict(word.removeprefix("--").split("=", 1) for word in argv if "=" in word)
    root = Path(given["trainer.default_root_dir"])
    run, begin = root / f"run-{os.getpid()}-{time.time_ns()}", 0
    if "ckpt_path" in given:
        run = Path(given["ckpt_path"]).parents[1]
        begin = torch.load(given["ckpt_path"], weights_only=True)["global_step"]
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    record = Record(id=run.name, status="running", config={})
    write_record(run / "record.json", record)
    for epoch in range(begin, int(given["epochs"])):
        if epoch - begin == int(given.get("stop", -1)):
            raise KeyboardInterrupt
        time.sleep(float(given.get("sleep", 0)))
        with (root.parent / "ran.txt").open("a") as file:
            file.write(f"{os.getpid()} {float(given['model.lr']):g} {epoch} {time.time()}\n")
        with (run / "metrics.csv").open("a") as file:
            file.write(f"{epoch},{os.getpid()}\n")
        torch.save({**CHECKPOINT, "global_step": epoch + 1}, run / "checkpoints" / "new")
        (run / "checkpoints" / "new").rename(run / "checkpoints" / "last.ckpt")
    metrics = {METRIC: 50 + 10 * float(given["model.lr"])}
    last = Evaluation(metrics, int(given["epochs"]) - 1)
    write_record(run / "record.json", replace(record, status="finished", last=last))
    return {**metrics, "record": str(run / "record.json")}
