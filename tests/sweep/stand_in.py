"""A stand-in for `fit`: in a blink, a record.json as a real run leaves it. Named to the engine with --fit."""

import json
import os
import time
from pathlib import Path

METRIC = "val/acc1_truncate_mean"


def fit(argv: list[str]) -> dict[str, float]:
    """val/acc1_truncate_mean = 50 + 10 lr - seed. --sleep=S takes S seconds, --end=how ends it that way; notes who ran what."""
    given = dict(word.removeprefix("--").split("=", 1) for word in argv if "=" in word)
    root = Path(given["trainer.default_root_dir"])
    lr, seed = float(given.get("model.lr", 0)), int(given.get("seed_everything", 0))
    with (root.parent / "ran.txt").open("a") as file:
        file.write(f"{os.getpid()} {lr:g} {seed} {time.time()}\n")
    end = given.get("end", "")
    run = root / "run"
    run.mkdir(exist_ok=True)
    time.sleep(float(given.get("sleep", 0)))
    if end == "raise":
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2.00 GiB")
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
    record = {"status": "finished", "last": {"epoch": 0, "metrics": metrics}, "bytes": {"packed": 1000 + int(100 * lr)}}
    (run / "record.json").write_text(json.dumps(record))
    return metrics
