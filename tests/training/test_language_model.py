"""Language models: token losses, perplexity by width and source, and the best epoch."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from tq_lightning import bit_width
from tq_lightning.callbacks.scores import SCORES
from tq_lightning.cli import main, run_fit
from tq_lightning.errors import TrainingError, UserError
from tq_lightning.quant.label_checks import check_labels, check_labels_are_shifted, check_logits
from tq_lightning.records import PPL, read_record
from tq_lightning.training.losses import cross_entropy, distillation
from tq_lightning.training.module import TQModule

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_language_model.py"
FIT = ["--model.name=own_language_model:network", "--data.name=own_language_model:texts"]
FIT += ["--data.data_args={count: 64}", "--model.model_args={width: 16}", "--data.workers=0"]
FIT += ["--model.task=language_modeling", "--model.norm=per_width_all", "--model.opt=adamw"]
FIT += ["--model.skip=last", "--model.lr=0.02", "--trainer.accelerator=cpu", "--data.batch_size=32"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(EXAMPLE, tmp_path)
    yield tmp_path
    sys.modules.pop("own_language_model", None)


def example():
    spec = importlib.util.spec_from_file_location("lm_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_token_loss_ignores_unlabeled_tokens():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [4, -100, -100]])
    kept = target != -100
    expected = torch.nn.functional.cross_entropy(logits[kept], target[kept])
    torch.testing.assert_close(cross_entropy(logits, target), expected)
    changed = logits.masked_fill(~kept[..., None], 3.0)
    assert cross_entropy(changed, target) == cross_entropy(logits, target)
    assert cross_entropy(logits, torch.full((2, 3), -100)) == 0
    teacher = torch.randn(2, 3, 5)
    soft = distillation(logits, teacher, 2.0, kept)
    torch.testing.assert_close(soft, distillation(logits[kept], teacher[kept], 2.0))
    assert soft != distillation(logits, teacher, 2.0)  # sums over tokens, divides by the batch


def test_run_records_perplexity(folder, capsys):
    fit = [*FIT, "--model.quantizer=round", "--trainer.max_epochs=3", "--run_dir=run"]
    metrics = run_fit([*fit, "--model.quantize_embeddings=true"])
    record = read_record(folder / "run" / "record.json")
    assert record.best.monitor == "val/ppl_truncate_mean" == PPL.monitor
    curve = dict(record.curves["val/ppl_truncate_mean"])
    assert record.best.epoch == min(curve, key=curve.get) and len(set(curve.values())) == 3
    assert record.parameters_embedding == pytest.approx(11 * 16 / sum_parameters(16))
    for bits in range(1, 9):
        q, t = (metrics[f"val/ppl_{source}_w{bits}"] for source in ("quantize", "truncate"))
        assert metrics[f"val/ppl_gap_w{bits}"] == pytest.approx(t - q, abs=1e-5)
    assert metrics["val/ppl_gap_w2"] != 0 == metrics["val/ppl_gap_w8"]
    assert {"val/ppl_float", "train/loss_w4", "val/tokens"} <= set(metrics)
    assert not any("acc1" in key or "images" in key for key in metrics if key.startswith("val/"))
    assert record.widths[2].qt_gap == pytest.approx(metrics_at(record, "val/ppl_gap_w2"))
    assert "perplexity quantized/truncated" in capsys.readouterr().out

    best = next((folder / "run" / "checkpoints").glob("best*.ckpt"))
    module = TQModule.load_from_checkpoint(best, name="own_language_model:network").eval()
    data, measured = example().texts(64)[1], {}
    for bits in (8, 2):
        perplexity = Perplexity(ignore_index=-100)
        for batch in DataLoader(data, batch_size=64):
            with torch.no_grad(), bit_width(module, bits, "truncate"):
                perplexity.update(module(batch["input_ids"]), batch["labels"])
        measured[bits] = float(perplexity.compute())
    config = str(folder / "run" / "config.yaml")
    assert main(["test", "--config", config, "--ckpt_path", str(best)]) == 0
    tested = read_record(folder / "run" / "record.json").test
    for bits, value in measured.items():
        assert tested.metrics[f"test/ppl_truncate_w{bits}"] == pytest.approx(value, rel=1e-4)
    assert tested.tokens == int((torch.stack([d["labels"] for d in data]) != -100).sum())
    assert "images" not in json.loads((folder / "run" / "record.json").read_text())["test"]
    assert main(["predict", "--config", config, "--ckpt_path", str(best)]) == 2
    assert "predict writes class probabilities" in capsys.readouterr().err


def sum_parameters(width):
    return sum(p.numel() for p in example().network(11, width).parameters())


def metrics_at(record, key):
    return record.best.metrics[key]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--model.task=translation", "model.task: got 'translation', pass one of classification"),
        ("--model.loss=bce", "model.loss: got 'bce', which is for classification"),
        ("--model.quantize_embeddings=some", "quantize_embeddings"),
    ],
)
def test_unsupported_choice_is_an_error_of_one_line(folder, capsys, extra, message):
    assert main(["fit", *FIT, "--trainer.max_epochs=1", extra]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_labels_of_another_task_are_an_error_of_one_line(folder, capsys):
    fit = ["fit", *FIT, "--trainer.max_epochs=1", "--model.task=classification"]
    assert main(fit) == 2
    assert "pass model.task=language_modeling for a label per token" in capsys.readouterr().err


def test_logits_and_labels_are_checked():
    ids = torch.randint(0, 9, (2, 4))
    check_logits("language_modeling", torch.zeros(2, 4, 9), ids)
    check_labels_are_shifted({"input_ids": ids[:, :-1]}, ids[:, 1:])
    check_labels_are_shifted(ids, torch.full_like(ids, -100))
    for task, logits in (("language_modeling", torch.zeros(2, 9)), ("classification", ("x",))):
        with pytest.raises(UserError):
            check_logits(task, logits, ids)
    with pytest.raises(UserError, match="the input tokens themselves"):
        check_labels_are_shifted({"input_ids": ids}, ids)


def test_large_cross_entropy_gives_a_finite_perplexity():
    h = type("H", (), {"max_bits": 1})()
    passes = [(1, "truncate"), (None, "quantize")]
    scores = SCORES["language_modeling"](passes, h, (1,), torch.device("cpu"))
    logits = torch.zeros(1, 2, 3)
    logits[..., 0] = 400.0
    scores.add(dict.fromkeys(scores._sums, logits), torch.tensor([[1, -100]]))
    values = scores.metrics("val", lambda x: x)
    assert values["val/ppl_truncate_w1"] == pytest.approx(math.exp(400.0))
    assert values["val/tokens"] == 1


def test_samples_without_a_label_are_not_counted():
    h = type("H", (), {"max_bits": 1, "num_classes": 3})()
    passes = [(1, "truncate"), (None, "quantize")]
    scores = SCORES["classification"](passes, h, (1,), torch.device("cpu"))
    logits = torch.eye(3) * 9
    scores.add(dict.fromkeys(scores._hits, logits), torch.tensor([0, -100, 0]))
    values = scores.metrics("val", lambda x: x)
    assert (values["val/acc1_truncate_w1"], values["val/images"]) == (50.0, 2.0)
    assert values["val/loss"] == pytest.approx(4.5, abs=0.01)
    scores = SCORES["classification"](passes, h, (1,), torch.device("cpu"))
    scores.add(dict.fromkeys(scores._hits, logits), torch.tensor([-100, -100, -100]))
    with pytest.raises(TrainingError, match="no val sample has a label; all are -100"):
        scores.metrics("val", lambda x: x)


def test_labels_beyond_the_outputs_are_an_error():
    logits = torch.zeros(2, 4)
    check_labels(logits, torch.tensor([3, -100]))
    check_labels(logits, torch.tensor([-100, -100]))
    check_labels(logits, torch.tensor([[0, 3, 9, 0], [1, 0, 0, 0]]))  # soft labels
    check_labels(logits, torch.tensor([9.0, 0.0]))  # another check reports the type
    for labels, message in (
        ([3, 4], "between 3 and 4, but the network has 4 outputs; pass --model.num_classes 5"),
        ([-1, 2], "between -1 and 2, but the network has 4 outputs; number the classes from 0"),
    ):
        with pytest.raises(UserError, match=message):
            check_labels(logits, torch.tensor(labels))
    with pytest.raises(UserError, match="between 156 and 156"):  # -100 as uint8
        check_labels(logits, torch.tensor([156, 156], dtype=torch.uint8))
