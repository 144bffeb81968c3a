"""Training, evaluation and packed models on a GPU (`make gpu`).

The tests also run on a CPU, with gloo instead of NCCL and bfloat16 instead of float16. This checks
the comparisons, but not the behavior of a GPU.
"""

import copy
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures.dispatch import HOST_READ, Operations
from lightning.pytorch.strategies import DDPStrategy

from tq_lightning import bit_width, calibrate_norms, load_packed, prepare, save_packed
from tq_lightning.callbacks.width_metrics import evaluate_batch
from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.quant.integer import integer_layers
from tq_lightning.quant.integer.kernels import missing_kernels
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.training.joint import joint_loss

WIDTHS = (8, 4, 2, 1)
PASSES = [(b, s) for b in (8, 4, 1) for s in ("quantize", "truncate")] + [(None, "quantize")]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
FITS = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """TF32 convolutions, the default on a GPU, round inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def prepare_model(device, **how):
    torch.manual_seed(0)
    model = create_model("resnet8_cifar", num_classes=10)
    prepare(model, verbose=False, **how)
    return model.to(device).train()


def make_batch(device):
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 16, 16, generator=draw)
    return images.to(device), torch.randint(0, 10, (8,), generator=draw).to(device)


def joint_step(model, network, images, target):
    loss, losses = joint_loss(
        network, images, WIDTHS, lambda bits, out, wider: F.cross_entropy(out, target)
    )
    loss.backward()
    return {bits: value.item() for bits, value in losses.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [{}, {"normalizer": "tanh_channel", "activations": "pact_round"}])
def test_weights_and_codes_equal_those_on_the_cpu(device, how):
    """Fused and separate weights have the same bits, and their codes equal those of the CPU."""
    model, reference = prepare_model(device, **how), prepare_model("cpu", **how)
    for ours, theirs in zip(weight_quantizers(model), weight_quantizers(reference), strict=True):
        one, other = (w.quantizer.codes(w.original)[0].cpu() for w in (ours, theirs))
        # a tanh of another library may fall on the other side of a bin edge
        assert (one != other).float().mean() < 1e-3
    images = make_batch(device)[0]
    calibrate_norms(model, [images])
    for (bits, source), logits in evaluate_batch(model.eval(), images, PASSES).items():
        with torch.no_grad(), bit_width(model, bits, source):
            assert torch.allclose(model(images), logits, atol=1e-5), (bits, source)


@pytest.mark.parametrize("device", DEVICES)
def test_joint_step_equals_the_cpu_and_synchronizes_once(device):
    model, reference = prepare_model(device), prepare_model("cpu")
    reads = Operations()
    images, target = make_batch(device)
    with reads:
        loss, losses = joint_loss(
            model, images, WIDTHS, lambda bits, out, wider: F.cross_entropy(out, target)
        )
        loss.backward()
    assert reads.counts[HOST_READ] == 1
    expected = joint_step(reference, reference, *make_batch("cpu"))
    for bits in WIDTHS:
        assert losses[bits].item() == pytest.approx(expected[bits], rel=1e-3)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            assert F.cosine_similarity(p.grad.cpu().flatten(), q.grad.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_and_evaluation_equal_eager_mode(device, mode):
    """`reduce-overhead` records a CUDA graph for each set of input tensors."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = prepare_model(device, activations="pact_floor_truncate")
    eager = copy.deepcopy(model)
    model.fused_model = None  # as in a TQModule: CUDA graphs need the same addresses in every step
    compiled = torch.compile(model, mode=mode)
    for _ in range(4):
        losses = joint_step(model, compiled, *make_batch(device))
        assert losses == pytest.approx(joint_step(eager, eager, *make_batch(device)), rel=1e-2)
    images = make_batch(device)[0]
    eager.load_state_dict(model.state_dict())
    for each in (model, eager):
        calibrate_norms(each, [images])
    logits = evaluate_batch(compiled.eval(), images, PASSES)
    expected = evaluate_batch(eager.eval(), images, PASSES)
    assert all(torch.allclose(logits[p], expected[p], atol=1e-2) for p in PASSES)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compile_mode", [None, "default"])
def test_recorded_steps_train_like_eager_ones(
    train, resnet, tmp_path, device, precision, compile_mode, monkeypatch
):
    """With one CUDA graph for a step; float activations have the same kernels in both runs."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch._dynamo.reset()
    how = {**resnet, "float_pass": True, "activations": "pact_floor_truncate"}
    how["compile"] = compile_mode is not None
    flags = {
        "accelerator": device, "precision": precision, "limit_train_batches": 8, "max_epochs": 2,
        "accumulate_grad_batches": 2,
    }  # fmt: skip
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(replay(g)))
    _, eager = train(tmp_path, how, **flags)
    _, recorded = train(tmp_path, {**how, "cuda_graph": True}, **flags)
    assert len(replays) == 13
    for (name, p), q in zip(recorded.named_parameters(), eager.parameters(), strict=True):
        print(f"{(p - q).abs().max():.2e} of {q.abs().max():.2e}: {name}")
        assert torch.allclose(p, q, rtol=1e-2, atol=2e-3), name


FIT_PRECISIONS = [
    pytest.param("cpu", "bf16-mixed", marks=pytest.mark.slow),
    *(pytest.param("cuda", p, marks=GPU) for p in ("32-true", "bf16-mixed", "16-mixed")),
]


@pytest.mark.parametrize(("device", "precision"), FIT_PRECISIONS)
def test_fit_keeps_a_moving_average(train, resnet, tmp_path, device, precision):
    trainer, module = train(
        tmp_path,
        {**resnet, "ema_decay": 0.5, "float_pass": True},
        accelerator=device,
        precision=precision,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        limit_train_batches=4,
    )
    assert trainer.global_step == 2 and trainer.strategy.root_device.type == device
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())
    metrics = trainer.callback_metrics
    assert all(f"val/acc1_truncate_w{bits}" in metrics for bits in range(1, 9))


@pytest.mark.parametrize("device", FITS)
@pytest.mark.parametrize("sync", [False, True])
def test_ddp_trains_on_one_device(train, resnet, tmp_path, device, sync):
    """One process, with the reducer and synchronized norms of multi-process training."""
    if sync and device == "cpu":
        pytest.skip("PyTorch synchronizes batch norms on GPUs only")
    strategy = DDPStrategy(
        process_group_backend="nccl" if device == "cuda" else "gloo", find_unused_parameters=True
    )
    how = {**resnet, "width_schedule": "sandwich"}
    flags = {"accelerator": device, "sync_batchnorm": sync}
    _, ddp = train(tmp_path, how, strategy=strategy, **flags)
    _, plain = train(tmp_path, how, **flags)
    for (name, p), q in zip(ddp.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.cpu(), q.cpu(), rtol=1e-3, atol=1e-4), name


RESUMES = [
    pytest.param("cpu", "cpu", marks=pytest.mark.slow),
    pytest.param("cuda", "cpu", marks=GPU),
    pytest.param("cpu", "cuda", marks=GPU),
]


@pytest.mark.parametrize(("device", "other"), RESUMES)
def test_run_resumes_on_the_other_device(train, resnet, tmp_path, device, other):
    flags = {"limit_train_batches": 2, "limit_val_batches": 1}
    trainer, module = train(tmp_path, resnet, accelerator=device, **flags)
    path = tmp_path / "first.ckpt"
    trainer.save_checkpoint(path)
    before = {k: v.cpu().clone() for k, v in module.state_dict().items()}
    resumed, after = train(
        tmp_path, resnet, accelerator=other, ckpt_path=path, **{**flags, "max_epochs": 2}
    )
    assert resumed.global_step == 4 and resumed.strategy.root_device.type == other
    moved = [k for k, v in after.state_dict().items() if not torch.equal(v.cpu(), before[k])]
    assert any("parametrizations" in k for k in moved)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["resident", "lean"])
def test_packed_models_give_the_logits_of_the_cpu(device, mode, tmp_path):
    model = prepare_model("cpu")
    calibrate_norms(model, [make_batch("cpu")[0]])
    save_packed(model.eval(), tmp_path / "net.safetensors")
    packed = load_packed(tmp_path / "net.safetensors", mode=mode).to(device)
    images = make_batch(device)[0]
    with torch.no_grad():
        for bits in (8, 4, 1):
            with bit_width(packed, bits), bit_width(model.to(device), bits, "truncate"):
                assert torch.allclose(packed(images), model(images), atol=1e-4)


@pytest.mark.skipif(missing_kernels() is not None, reason=str(missing_kernels()))
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=GPU)])
def test_integer_mode_on_a_gpu_is_an_error_of_one_line(device, tmp_path):
    model = prepare_model("cpu", activations="clamp_floor")
    calibrate_norms(model, [make_batch("cpu")[0]])
    save_packed(model.eval(), tmp_path / "net.safetensors")
    packed = load_packed(tmp_path / "net.safetensors", mode="integer")
    with pytest.raises(UserError, match="integer mode runs on CPU") as error, torch.no_grad():
        if device == "cuda":
            packed.to(device)(make_batch(device)[0])
        else:  # only the first layer: others would mix devices before it
            integer_layers(packed)[0].prepacked(torch.empty(1, device=device))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    """On a CPU with a tiny case; one line without a GPU if no device is given."""
    script = [sys.executable, "tests/benchmarks/gpu.py", "--out", str(tmp_path / "gpu.csv")]
    tiny = ["--device", "cpu", "--cases", "resnet8_cifar:8:2", "--modes", "eager", "--repeats", "1"]
    root = Path(__file__).parents[2]
    subprocess.run([*script, *tiny], check=True, cwd=root)
    with (tmp_path / "gpu.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["value"]) > 0 and row["note"].startswith("cpu; ")
    if not torch.cuda.is_available():
        done = subprocess.run(script, capture_output=True, text=True, cwd=root)
        assert done.returncode == 2
        assert done.stderr == "error: no CUDA device found; this benchmark needs one\n"
