"""Models: structure of the CIFAR networks, all kinds of checkpoints, and one-line errors."""

import pickle
import socket
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.models.weights import load_weights, read_state_dict
from tq_lightning.quant.bit_width import bit_width
from tq_lightning.quant.prepare import prepare

CIFAR = {  # name -> (parameters at 10 classes, added up by hand; convolutions and linear layers)
    "resnet8_cifar": (75_290, 8),
    "resnet20_cifar": (269_722, 20),
    "resnet56_cifar": (853_018, 56),
    "preresnet20_cifar": (272_474, 22),
    "preresnet20_cifar_x5": (6_758_810, 22),
}


def all_equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(ka == kb and torch.equal(va, vb) for (ka, va), (kb, vb) in pairs)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_networks_have_the_known_structure_and_the_timm_interface(name):
    model = create_model(name).eval()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert (sum(p.numel() for p in model.parameters()), len(layers)) == CIFAR[name]
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape[-2:] == (8, 8)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    cfg = create_model(name, num_classes=7, in_chans=1).pretrained_cfg
    assert cfg["input_size"] == (3, 32, 32) and cfg["mean"] == (0.485, 0.456, 0.406) and cfg["std"]
    for key in ("first_conv", "classifier"):
        assert model.get_submodule(cfg[key]) is not None
    assert create_model(name, num_classes=7, in_chans=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert name in timm.list_models("*cifar*")


def test_option_a_shortcut_subsamples_its_input():
    """With zero residual branches the network is stem, ReLU, subsampling and zero padding."""
    model = create_model("resnet8_cifar").eval()
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
    x = torch.randn(1, 3, 32, 32)
    stem = model.act1(model.bn1(model.conv1(x)))
    features = model.forward_features(x)
    assert torch.equal(features[:, 24:40], stem[:, :, ::4, ::4])
    assert features[:, :24].abs().sum() == 0 and features[:, 40:].abs().sum() == 0
    assert stem.abs().sum() > 0


def test_preactivation_network_has_expansion_and_projection():
    assert (
        parameter_count(create_model("preresnet20_cifar", expansion=5))
        == CIFAR["preresnet20_cifar_x5"][0]
    )
    model = create_model("preresnet20_cifar")
    projections = [name for name, _ in model.named_modules() if name.endswith("skip_conv")]
    assert projections == ["layer2.0.skip_conv", "layer3.0.skip_conv"]
    report = prepare(model, skip=("first", "last", "*skip_conv"), verbose=False)
    assert sum("floor" in what for what in report.values()) == 18
    assert (model.forward_features(torch.randn(2, 3, 32, 32)) < 0).any(), (
        "no ReLU before the pooling"
    )


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_relu_is_a_separate_module():
    """Otherwise several activations would share one learned clip."""
    model = create_model("resnet8_cifar")
    used: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, *_: used.append(id(m)))
    model(torch.randn(2, 3, 32, 32))
    assert len(used) == len(set(used)) == 7


def with_prefix(prefix):
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


WRAPS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "best_prec1": 91.7, "epoch": 3},
    "data parallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "lightning": lambda s: {
        "state_dict": {f"model.{k}": v for k, v in s.items()},
        "global_step": 7,
    },
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **with_prefix("module.")(s)},
    "a compiled part": lambda s: {
        k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()
    },
    **{
        prefix: with_prefix(prefix)
        for prefix in (
            "_orig_mod.module.",
            "module._orig_mod.",
            "model.module.",
            "module.model.",
            "model._orig_mod.module.",
            "module.module._fsdp_wrapped_module.",
        )
    },
    "timm with EMA": lambda s: {
        "state_dict": {k: v * 0 for k, v in s.items()},
        "state_dict_ema": s,
        "version": 2,
    },
    "public CIFAR": lambda s: {
        "state_dict": {
            f"module.{k.replace('fc.', 'linear.')}": v
            for k, v in s.items()
            if "num_batches_tracked" not in k
        }
    },
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_kind_of_checkpoint_is_loaded(tmp_path, wrap):
    source = create_model("resnet8_cifar")
    torch.save(WRAPS[wrap](source.state_dict()), tmp_path / "w.pth")
    assert all_equal(create_model("resnet8_cifar", checkpoint_path=tmp_path / "w.pth"), source)
    assert not all_equal(create_model("resnet8_cifar"), source)


def test_parameter_names_like_a_wrapper_prefix_are_kept(tmp_path):
    source, target = (nn.Sequential(OrderedDict(model=nn.Linear(3, 2))) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert all_equal(source, target)
    torch.save(with_prefix("model.module.")(source.state_dict()), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert all_equal(source, target)


BROKEN = {  # name -> content of a file instead of the state dict of resnet8_cifar
    "not a tensor": (lambda s: {**s, "fc.bias": "ten"}, "has no state dict"),
    "a name that is a number": (lambda s: {**s, 7: s["fc.bias"]}, "has no state dict"),
    "another shape": (
        lambda s: {**s, "layer1.0.conv1.weight": torch.zeros(3, 3)},
        r"layer1\.0\.conv1\.weight has shape \(3, 3\), resnet8_cifar has \(16, 16, 3, 3\)",
    ),
    "no dimensions": (
        lambda s: {**s, "fc.weight": torch.tensor(1.0)},
        r"fc\.weight has shape \(\)",
    ),
    "sparse": (lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()}, "does not fit"),
    "only a counter": (lambda s: {"n_averaged": torch.tensor(1)}, "does not fit resnet8_cifar"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_invalid_checkpoint_is_an_error_of_one_line(tmp_path, case):
    breaking, message = BROKEN[case]
    torch.save(breaking(create_model("resnet8_cifar").state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        create_model("resnet8_cifar", checkpoint_path=tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


def test_safetensors_file_is_loaded(tmp_path):
    source = create_model("test_vit")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert all_equal(
        create_model("test_vit", checkpoint_path=str(tmp_path / "w.safetensors")), source
    )


@pytest.mark.parametrize("activations", [None, "pact_floor"])
def test_checkpoint_of_a_prepared_model_gives_its_float_network(tmp_path, activations):
    source = create_model("resnet8_cifar")
    prepare(source, activations=activations, verbose=False)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    torch.save(
        {"state_dict": {f"model.{k}": v for k, v in source.state_dict().items()}},
        tmp_path / "last.ckpt",
    )
    model = create_model("resnet8_cifar", checkpoint_path=tmp_path / "last.ckpt").eval()
    x = torch.randn(2, 3, 32, 32)
    with bit_width(source.eval(), None):
        assert torch.equal(model(x), source(x))  # no activation reaches the learned clip here


class RunsCode:
    def __reduce__(self):
        return (print, ("a file ran code",))


def test_checkpoint_file_never_runs_code(tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"state_dict": RunsCode()}))
    torch.save({"state_dict": RunsCode()}, tmp_path / "bad.ckpt")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name, why in {
        "bad.pth": "contains objects that could run code",
        "bad.ckpt": "contains objects that could run code",
        "script.pt": "is a TorchScript archive",
    }.items():
        with warnings.catch_warnings(), pytest.raises(UserError, match=why) as caught:
            warnings.simplefilter("error")
            read_state_dict(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # advice of torch to disable the check
    assert "ran code" not in capsys.readouterr().out


def test_checkpoint_that_does_not_fit_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(create_model("resnet8_cifar").state_dict(), path)
    cases = {
        "pass num_classes=10": {"name": "resnet8_cifar", "num_classes": 100},
        "pass in_chans=3": {"name": "resnet8_cifar", "in_chans": 1},
        "does not fit resnet20_cifar: tensors .* missing": {"name": "resnet20_cifar"},
    }
    for message, kwargs in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            create_model(checkpoint_path=path, **kwargs)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "half.safetensors").write_bytes(b"\0" * 40)
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in {
        "half.pth": "cannot read",
        "half.safetensors": "cannot read",
        "none.pth": "no checkpoint at",
        "list.pth": "no state dict",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_weights(create_model("resnet8_cifar"), tmp_path / name)
        assert "\n" not in str(caught.value)


def test_unknown_names_and_arguments_are_errors():
    for kwargs, message in {
        ("resnet2O_cifar",): "did you mean.*resnet20_cifar",
        ("qqqqqqqqqqqqq",): "list_models",
        ("resnet18.no_such_tag",): "tag",
    }.items():
        with pytest.raises(UserError, match=message):
            create_model(*kwargs)
    with pytest.raises(UserError, match="shade"):
        create_model("resnet8_cifar", shade="red")


def test_pretrained_weights_without_internet_are_a_quick_error_of_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    def unknown_host(*args, **kwargs):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    monkeypatch.setattr("tq_lightning.models.create.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="checkpoint_path=FILE") as caught:
        create_model("resnet18", pretrained=True)
    assert "\n" not in str(caught.value)
    assert before == constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="No pretrained weights exist"):
        create_model("resnet8_cifar", pretrained=True)
