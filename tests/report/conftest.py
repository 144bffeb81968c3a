"""Synthetic records: what a run and `inspect` would write, with numbers of the right shape and no training."""

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

WIDTHS = range(1, 9)
ROUND_LOST = {1: 0.0, 2: 60.0, 3: 18.0, 4: 5.0, 5: 2.0, 6: 0.9, 7: 0.4, 8: 0.0}
DISAGREE = {1: 0.0, 2: 0.33, 3: 0.41, 4: 0.44, 5: 0.45, 6: 0.38, 7: 0.25, 8: 0.0}
BASE = {1: 75.0, 2: 84.0, 3: 85.0, 4: 86.0, 5: 86.2, 6: 86.3, 7: 86.3, 8: 86.3}


def run(quantizer="floor", seed=0, model="resnet20_cifar", epochs=15, test=False, offset=0.0, noise=0.2, **more):
    """A finished run's record. `more`: `model_X`, `data_X`, `trainer_X` set configuration keys, other names top-level ones."""
    config = {
        "seed_everything": seed,
        "trainer": {"max_epochs": epochs, "default_root_dir": f"runs/{model}_{quantizer}_s{seed}", "logger": None},
        "model": {
            "name": model,
            "quantizer": quantizer,
            "ste": "auto",
            "level": "endpoint",
            "activations": None,
            "normalizer": "tanh",
            "norm": "per_width",
            "widths": [8, 4, 2, 1],
            "lr": 0.001,
        },
        "data": {"name": "cifar10", "root": "/home/someone/data/cifar10", "batch_size": 128},
    }
    for key, value in more.items():
        part, _, name = key.partition("_")
        if part in ("model", "data", "trainer") and name:
            config[part][name] = value
    top = {k: v for k, v in more.items() if k.split("_")[0] not in ("model", "data", "trainer")}
    name = json.dumps([config, top], sort_keys=True)
    rng = random.Random(name)
    quantized = {w: round(BASE[w] + offset + rng.gauss(0, noise), 2) for w in WIDTHS}
    lost = {w: 0.0 if quantizer == "floor" else ROUND_LOST[w] for w in WIDTHS}
    widths = {
        str(w): {
            "quantize": quantized[w],
            "truncate": round(quantized[w] - lost[w], 2),
            "qt_gap": lost[w],
            "disagree": 0.0 if quantizer == "floor" else DISAGREE[w],
        }
        for w in WIDTHS
    }
    size = 30_000 if "8" in model else 270_000
    metrics = {f"val/acc1_{s}_w{w}": widths[str(w)][s] for w in WIDTHS for s in ("quantize", "truncate")}
    metrics["val/acc1_float"] = 87.0 + offset
    record = {
        "schema": 1,
        "id": hashlib.sha1(name.encode()).hexdigest()[:16],
        "status": "finished",
        "reason": None,
        "command": "python -m tq_lightning fit --config /home/someone/conf/r20_cifar10.yaml",
        "config": config,
        "seed": seed,
        "versions": {"tq_lightning": "0.1.0", "torch": "2.8.0", "python": "3.11.9"},
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": "cpu",
        "started": "2025-01-01T00:00:00",
        "seconds": 12.5,
        "epochs": epochs,
        "steps": 300 * epochs,
        "last": {"epoch": epochs - 1, "metrics": metrics},
        "best": {"epoch": epochs - 1, "monitor": "val/acc1_truncate_mean", "metrics": metrics},
        "curves": {
            f"val/acc1_truncate_w{w}": [[e, widths[str(w)]["truncate"] * (1 - 0.5 ** (e + 1))] for e in range(epochs)]
            for w in (8, 4, 2, 1)
        },
        "widths": widths,
        "bytes": {"float": 4 * size, "packed": size + 5000, "planes": {str(w): size * w // 8 + 5000 for w in WIDTHS}},
    }
    if test:
        scores = {f"test/acc1_{s}_w{w}": widths[str(w)][s] - 1 for w in WIDTHS for s in ("quantize", "truncate")}
        record["test"] = {
            "checkpoint": "best",
            "epoch": epochs - 1,
            "images": 10000,
            "metrics": {**scores, "test/acc1_float": 86.0},
        }
    return record | top


def inspect(model="resnet50", parameters=25_557_032, skip=("first",)):
    """An inspect record with plausible bytes, energies and the staircases on a coarse grid."""
    size, norms = float(parameters), parameters * 0.002
    way = lambda **parts: {**parts, "total": int(sum(parts.values()))}  # noqa: E731
    u = [(i + 0.5) / 512 for i in range(512)]
    floor = {b: [int(x * 2**b) / (2**b - 1) for x in u] for b in (1, 2, 3, 4)}
    rounded = {b: [round(x * (2**b - 1)) / (2**b - 1) for x in u] for b in (1, 2, 3, 4)}
    shifted = {b: [(round(x * 255) >> (8 - b)) / (2**b - 1) for x in u] for b in (1, 2, 3, 4)}
    return {
        "schema": 1,
        "kind": "inspect",
        "id": hashlib.sha1(f"{model}{skip}".encode()).hexdigest()[:16],
        "model": model,
        "model_args": {},
        "policy": {"skip": list(skip), "widths": [8, 4, 2, 1], "max_bits": 8, "norm": "per_width"},
        "versions": {},
        "commit": None,
        "command": f"python -m tq_lightning inspect --model.name {model}",
        "parameters": parameters,
        "quantized_parameters": parameters,
        "layers": [{"name": "conv1", "kind": "conv", "shape": [64, 3, 7, 7], "parameters": 9408, "bits": None, "bytes": {}}],
        "ways": {
            "float_master": way(weights=4 * size, float=0.0, norms=0.0, scales=0.0),
            "file_per_width": way(weights=4.5 * size, float=8 * 40_000.0, norms=8 * norms * 4, scales=8 * 220.0),
            "master8": way(weights=size, float=40_000.0, norms=norms * 4, scales=220.0),
            "packed": way(weights=size, float=40_000.0, norms=9 * norms * 4, scales=220.0),
            "paper": way(weights=size, float=40_000.0, norms=8 * norms * 4, scales=0.0),
        },
        "read_at": {str(w): int(size * w / 8 + 40_000 + norms * 4) for w in WIDTHS},
        "paper_ratio": 3.533,
        "policy_ratio": 3.31,
        "accounting": [f"{parameters:,} float parameters x 4 bytes", "8-bit weights, the stem in float, 8 norm sets"],
        "energy": {
            "assumptions": ["every weight comes once from DRAM", "45 nm, 0.9 V"],
            "constants_pj": {"DRAM access, 64 bits": 1300.0, "8-bit add": 0.03},
            "source": "a table of 45 nm",
            "by_width": {str(w): {"refetch_float_pj": size * 650.0, "shift_pj": size * 0.13 * (1 + w / 8)} for w in WIDTHS},
        },
        "mechanism": {
            "bits": [1, 2, 3, 4],
            "u": u,
            "round": {str(b): v for b, v in rounded.items()},
            "round_shifted": {str(b): v for b, v in shifted.items()},
            "floor": {str(b): v for b, v in floor.items()},
        },
    }


def write(folder: Path, *records: dict) -> Path:
    """Each record into a run folder of its own (`inspect_N.json` for inspect records); returns `folder`."""
    for record in records:
        own = record.get("kind") == "inspect"
        path = folder / f"inspect_{record['id']}.json" if own else folder / record["id"] / "record.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    return folder


def pair(seeds=(0, 1, 2), **more):
    """Runs of round and floor in one setting."""
    return [run(quantizer, seed, **more) for quantizer in ("round", "floor") for seed in seeds]


def everything():
    """Records that make every figure: three depths, STEs, levels, activations, four inspected models, the paper's setting."""
    records = []
    for model, offset in (("resnet8_cifar", -8.0), ("resnet20_cifar", 0.0), ("resnet56_cifar", 2.0)):
        records += pair(model=model, offset=offset)
        records += [run("floor", seed, model, offset=offset + 0.3, model_ste="identity") for seed in (0, 1, 2)]
    records += [run("floor", seed, model_level=level, offset=-0.5) for level in ("left", "centre") for seed in (0, 1, 2)]
    for kind in ("clamp_round", "clamp_round_truncate"):
        records += pair(seeds=(0, 1), model_activations=kind, offset=-2.0)
    records += pair(model="preresnet20_cifar", model_activations="clamp_round", test=True, epochs=20)
    records += [run("round", 0, "mobilenetv3_small"), run("floor", 0, "mobilenetv3_small", epochs=10)]
    models = (
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("mobilenetv3_large_100", 5_483_032),
        ("vit_tiny_patch16_224", 5_717_416),
    )
    return records + [inspect(model, n) for model, n in models]


@pytest.fixture
def make():
    """The functions that make records: run, inspect, pair, everything, write."""
    return SimpleNamespace(run=run, inspect=inspect, pair=pair, everything=everything, write=write)
