"""The real `wandb sweep` and `wandb agent` on files of sweeps/, with a stand-in for the server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb_stand_in import ENTITY, PROJECT, WandbStandIn, points

ROOT = Path(__file__).parents[2]
TINY = [
    "--config",
    "conf/digits.yaml",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--model.calibration_batches=1",
]


@pytest.fixture
def server():
    stand_in = WandbStandIn()
    yield stand_in
    stand_in.close()


def tiny(name, tmp_path, *settings):
    """Copy a file of sweeps/ with tiny runs: two batches of digits, everything else unchanged."""
    raw = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    raw["parameters"]["trainer.max_epochs"] = {"value": 1}
    command = raw["command"]
    at = command.index("--config")
    raw["command"] = [
        command[0],
        *settings,
        *command[1:at],
        *TINY,
        f"--trainer.default_root_dir={tmp_path}/runs",
        *command[at + 2 :],
    ]
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def wandb(server, tmp_path, *argv):
    """Run the wandb client with the stand-in as its server. Return its output."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("WANDB_")
    } | {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_ENTITY": ENTITY,
        "WANDB_PROJECT": PROJECT,
        "WANDB_DIR": str(tmp_path),
        "WANDB_ERROR_REPORTING": "false",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *argv],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def records(tmp_path):
    return [
        json.loads(path.read_text()) for path in sorted((tmp_path / "runs").glob("*/record.json"))
    ]


def test_stand_in_expands_nested_parameters_like_wandb():
    nested = {
        "a": {"values": [1, 2]},
        "m": {"parameters": {"b": {"value": None}, "c": {"values": [[8], True]}}},
    }
    assert points(nested)[1] == {"a": 1, "m": {"b": None, "c": True}} and len(points(nested)) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wandb_agent_runs_a_sweep_file_online(server, tmp_path):
    """Two arms with nested parameters and lists: each has a run with curves and its record."""
    wandb(server, tmp_path, "sweep", str(tiny("widths_and_distillation", tmp_path)))
    printed = wandb(server, tmp_path, "agent", "--count", "2", f"{ENTITY}/{PROJECT}/sweep0")
    # the agent exits with 0 even if its trials fail, so check the runs
    ran = records(tmp_path)
    assert [record["status"] for record in ran] == ["finished", "finished"], printed
    for record, point in zip(ran, server.sent, strict=True):
        model = record["config"]["model"]
        assert (
            record["seed"] == point["seed_everything"]
            and {key: model[key] for key in point["model"]} == point["model"]
        )
    assert server.sent[0] != server.sent[1] and isinstance(server.sent[0]["model"]["widths"], list)
    assert list(server.runs) == ["run0", "run1"] and {
        run["sweep"] for run in server.runs.values()
    } == {"sweep0"}
    for name, record in zip(server.runs, ran, strict=True):
        run = server.runs[name]
        assert run["exitcode"] == 0, printed
        logged = {key for line in run["history"] for key in line}
        assert {f"val/acc1_truncate_w{bits}" for bits in range(1, 9)} | {
            "val/qt_gap_w2",
            "train/loss_w2",
            "widths",
            "qt_gap",
        } <= logged
        assert run["summary"]["val/acc1_truncate_w2"] == pytest.approx(
            record["last"]["metrics"]["val/acc1_truncate_w2"]
        )
        assert json.loads(server.uploads[f"{name}/record.json"])["id"] == record["id"]
        assert "batch_size" in json.dumps(run["config"]) and "weight_decay" in json.dumps(
            run["config"]
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_offline_run_is_synced_later(server, tmp_path):
    wandb(server, tmp_path, "sweep", str(tiny("activations", tmp_path, "WANDB_MODE=offline")))
    printed = wandb(server, tmp_path, "agent", "--count", "1", f"{ENTITY}/{PROJECT}/sweep0")
    (record,) = records(tmp_path)
    assert record["status"] == "finished" and record["config"]["model"]["activations"] is None, (
        printed
    )
    assert not server.runs
    (offline,) = [path.parent for path in tmp_path.rglob("run-*.wandb")]
    wandb(server, tmp_path, "sync", str(offline))
    (run,) = server.runs.values()
    assert any("val/acc1_truncate_w2" in line for line in run["history"])
