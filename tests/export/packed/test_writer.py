"""save_packed and load_packed: the truncated network bit for bit, and planes as a prefix."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from tq_lightning import bit_width, calibrate_norms, load_packed, prepare, save_packed
from tq_lightning.errors import UserError
from tq_lightning.export.packed.container import Container, write_container
from tq_lightning.export.packed.edit import read_all
from tq_lightning.export.packed.weight import packed_weights
from tq_lightning.models import create_model
from tq_lightning.quant.switchable_norm import per_width_norms

CASES = {
    "floor": {},
    "round, activations truncated": {
        "quantizer": "round",
        "activations": "clamp_round_truncate",
        "level": "left",
    },
    "learned clips, per channel": {"activations": "pact_floor", "normalizer": "tanh_channel"},
    "vit, shared norms": {
        "name": "test_vit",
        "size": 160,
        "classes": 5,
        "norm": "shared",
        "level": "centre",
    },
    "4 stored bits": {"max_bits": 4, "widths": (4, 2), "skip": ()},
    "gray images": {"model_args": {"in_chans": 1}, "norm": "per_width_all"},
}


def logits(model, images, bits, source=None):
    with torch.no_grad(), bit_width(model, bits, source):
        return model(images)


@pytest.mark.parametrize("mode", ["resident", "lean"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_the_truncated_training_model(make, case, mode, tmp_path):
    model, images = make(**case)
    save_packed(model, tmp_path / "m.safetensors", model_args=case.get("model_args"))
    whole = load_packed(tmp_path / "m.safetensors", mode=mode)
    top = model.tq["max_bits"]
    for bits in (2, top, *range(1, top + 1)):  # switching back and forth loses nothing
        expected = logits(model, images, bits, "truncate")
        assert torch.equal(logits(whole, images, bits), expected)
        if bits in (1, 3):
            alone = load_packed(tmp_path / "m.safetensors", bits=bits, mode=mode)
            assert torch.equal(alone(images), expected)
    assert not torch.equal(logits(whole, images, 1), logits(whole, images, top))
    assert not any(
        p.is_floating_point() and p.dim() == 4
        for n, p in whole.named_buffers()
        if n.endswith("original")
    )


def test_packed_model_differs_from_round_quantized(make, tmp_path):
    model, images = make(quantizer="round")
    save_packed(model, tmp_path / "m.safetensors")
    served = logits(load_packed(tmp_path / "m.safetensors"), images, 3)
    assert torch.equal(served, logits(model, images, 3, "truncate"))
    assert not torch.equal(served, logits(model, images, 3, "quantize"))


def test_first_planes_are_a_prefix_of_the_file(packed, net, tmp_path):
    with Container(packed) as file:
        sections, start, size = file.sections, file.data_start, file.size
    planes = [name for name in sections if name.startswith("plane")]
    assert planes == [f"plane{p}" for p in range(8)]
    order = list(sections)
    assert order[-9:] == ["scale", *planes]  # all floats come first, and nothing follows the planes
    assert order[:-9] == ["float", *(f"norm{n}" for n in range(1, 9))]
    assert start + sections["plane7"][1] == size
    assert {end - begin for begin, end in (sections[p] for p in planes)} == {
        sections["plane0"][1] - sections["plane0"][0]
    }
    # safetensors would write the same tensors at the same offsets
    with safe_open(packed, "np") as file:
        metadata = file.metadata()
    save_file(load_file(packed), tmp_path / "again.safetensors", metadata=metadata)
    ours, theirs = packed.read_bytes(), (tmp_path / "again.safetensors").read_bytes()
    assert theirs[8 + int.from_bytes(theirs[:8], "little") :] == ours[start:]


def test_file_has_no_float_weights_of_quantized_layers(packed, net):
    header = json.loads(load_metadata(packed)["header"])
    quantized = {layer["name"] for layer in header["layers"]}
    stored = load_file(packed)
    assert quantized and not any(name.split("/")[-1] in quantized for name in stored)
    floats = sum(a.size for n, a in stored.items() if n.startswith("float/"))
    assert floats == sum(
        p.numel()
        for n, p in net[0].named_parameters()
        if n in ("conv1.weight", "fc.weight", "fc.bias")
    )


def load_metadata(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def test_reader_reads_only_what_a_width_needs(packed, net, tmp_path):
    """A reader at 2 bits never reads the other planes and norm sets."""
    raw = bytearray(packed.read_bytes())
    with Container(packed) as file:
        spans = {
            name: (file.data_start + a, file.data_start + b)
            for name, (a, b) in file.sections.items()
        }
    unread = [f"plane{p}" for p in range(2, 8)] + [f"norm{n}" for n in (1, 3, 4, 5, 6, 7, 8)]
    for name in unread:
        begin, end = spans[name]
        raw[begin:end] = b"\xff" * (end - begin)
    (tmp_path / "m.safetensors").write_bytes(raw)
    two = load_packed(tmp_path / "m.safetensors", bits=2)
    assert torch.equal(two(net[1]), logits(net[0], net[1], 2, "truncate"))
    assert two.tq_file["bytes_read"] == len(raw) - sum(spans[n][1] - spans[n][0] for n in unread)
    with pytest.raises(UserError, match="checksum of section 'norm3'"):
        load_packed(tmp_path / "m.safetensors", bits=3)


def test_folded_norms_agree_within_the_documented_tolerance(net, packed, tmp_path):
    model, images = net
    plain = packed.stat().st_size
    sizes = save_packed(model, tmp_path / "f.safetensors", fold_norms=True)
    with Container(packed) as file:
        begin, end = file.sections["norm4"]
    assert sizes["total"] < plain and sizes["norm4"] * 2 == end - begin
    folded = load_packed(tmp_path / "f.safetensors")
    for bits in range(1, 9):
        expected, got = logits(model, images, bits, "truncate"), logits(folded, images, bits)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["shared", "per_width"])
def test_folded_norms_keep_the_type_of_the_network(norm, dtype, tmp_path):
    def build():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(64, 3)).to(dtype)

    model, images = build(), torch.randn(4, 3, 8, 8, dtype=dtype)
    prepare(model, norm=norm, verbose=False)
    model(images)  # in training mode, which gives the norm statistics
    calibrate_norms(model.eval(), [images])
    for fold in (True, False):
        save_packed(model, tmp_path / "m.safetensors", fold_norms=fold)
        loaded = load_packed(tmp_path / "m.safetensors", model=build())
        expected, got = logits(model, images, 4, "truncate"), logits(loaded, images, 4)
        assert got.dtype == dtype
        assert fold or torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_compressed_file_is_lossless_and_read_by_prefix(net, tmp_path):
    model, images = net
    sizes = save_packed(model, tmp_path / "z.safetensors", compress=True)
    for bits in (1, 3, 8):
        part = load_packed(tmp_path / "z.safetensors", bits=bits)
        assert torch.equal(part(images), logits(model, images, bits, "truncate"))
    assert (
        load_packed(tmp_path / "z.safetensors", bits=1).tq_file["bytes_read"] < sizes["total"] / 2
    )


@pytest.mark.parametrize("normalizer", ["tanh", "absmax_channel"])
def test_any_module_loads_if_the_model_is_given(normalizer, tmp_path):
    """Recurrent, attention, transposed and tied weights, and buffers of other types."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.rnn = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True)
            self.att = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up = nn.ConvTranspose1d(8, 8, 3, groups=2)
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 11)
            self.b.weight, self.head.weight = self.a.weight, self.emb.weight
            self.register_buffer("mask", torch.ones(5, dtype=torch.bool))
            self.register_buffer("pos", torch.randn(5, 8), persistent=False)

        def forward(self, ids):
            x = (self.emb(ids) + self.pos) * self.mask[:, None]
            x, _ = self.rnn(x)
            x, _ = self.att(x, x, x)
            return self.head(self.b(self.a(self.up(x.mT).mT)))

    model = Odd()
    prepare(model, skip=(), normalizer=normalizer, verbose=False)
    model.eval()
    ids = torch.randint(0, 11, (3, 5))
    save_packed(model, tmp_path / "m.safetensors")
    served = load_packed(tmp_path / "m.safetensors", model=Odd())
    assert len(packed_weights(served)) == 8
    for bits in (8, 2, 5):
        assert torch.equal(logits(served, ids, bits), logits(model, ids, bits, "truncate"))
    with pytest.raises(UserError, match="pass the network itself as model="):
        load_packed(tmp_path / "m.safetensors")


def test_widths_without_norm_statistics_are_errors(make, tmp_path):
    model, images = make(widths=(8, 2))
    for module in model.modules():
        if hasattr(module, "calibrated"):
            module.calibrated.fill_(False)
    save_packed(model, tmp_path / "m.safetensors")
    served = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(logits(served, images, 2), logits(model, images, 2, "truncate"))
    with pytest.raises(UserError, match="no norm statistics"), bit_width(served, 4):
        pass
    with pytest.raises(UserError, match="no norm statistics for 4 bits"):
        load_packed(tmp_path / "m.safetensors", bits=4)


def test_calibrating_a_packed_model_is_an_error(packed, net):
    served = load_packed(packed)
    before = {name: value.clone() for name, value in served.state_dict().items()}
    with pytest.raises(ValueError, match="a packed model has the statistics of its file"):
        calibrate_norms(served, [net[1]])
    assert all(torch.equal(value, before[name]) for name, value in served.state_dict().items())
    assert torch.equal(logits(served, net[1], 7), logits(net[0], net[1], 7, "truncate"))


def test_width_that_was_not_loaded_does_not_mention_calibration(make, tmp_path):
    model, _ = make("preresnet20_cifar")  # its first module with a width is a norm layer
    save_packed(model, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="loaded for widths 4, not 3; load it with bits=None"):
        bit_width(load_packed(tmp_path / "m.safetensors", bits=4), 3).__enter__()


def test_invalid_input_is_an_error(make, net, packed, tmp_path):
    served = load_packed(packed)
    with pytest.raises(ValueError, match="no float weights"), bit_width(served, None):
        pass
    with pytest.raises(ValueError, match="source='truncate'"), bit_width(served, 4, "quantize"):
        pass
    with (
        pytest.raises(UserError, match="loaded for widths 2, not 4"),
        bit_width(load_packed(packed, bits=2), 4),
    ):
        pass
    for bits in (0, 9, True, 2.0):
        with pytest.raises(UserError, match="bits from 1 to 8"):
            load_packed(packed, bits=bits)
    with pytest.raises(UserError, match="unknown mode"):
        load_packed(packed, mode="fat")
    with pytest.raises(UserError, match="not prepared"):
        save_packed(nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="max_bits from 1 to 8"):
        save_packed(net[0], tmp_path / "x.safetensors", max_bits=9)
    with pytest.raises(UserError, match="no folder"):
        save_packed(net[0], tmp_path / "nowhere" / "x.safetensors")
    other = make("resnet20_cifar")[0]
    with pytest.raises(UserError, match="compared with the network"):
        save_packed(other, tmp_path / "x.safetensors", name="resnet8_cifar")
    assert not list(tmp_path.iterdir())


def test_network_that_does_not_fit_a_file_without_a_model_name_is_named_as_passed(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    prepare(net, skip=(), verbose=False)
    save_packed(net, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"with the network passed as model=; pass the network"):
        load_packed(tmp_path / "net.safetensors", model=nn.Sequential(nn.Linear(8, 8, bias=False)))
    with pytest.raises(UserError, match="got the class Linear; pass the network itself"):
        load_packed(tmp_path / "net.safetensors", model=nn.Linear)


class TwoNames(nn.Module):
    """Modules with two names each, which are called under the second one."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc1, self.bn, self.fc2 = (
            nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2)
        )  # fmt: skip
        self.layers = nn.Sequential(self.stem, self.fc1, self.bn, nn.ReLU(), self.fc2)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("norm", ["per_width", "shared"])
def test_modules_with_two_names_are_stored_once(norm, fold, tmp_path):
    torch.manual_seed(0)
    path, model, x = tmp_path / "x.safetensors", TwoNames(), torch.randn(16, 8)
    prepare(model, norm=norm, verbose=False)
    calibrate_norms(model, [x])
    save_packed(model.eval(), path, fold_norms=fold)
    with Container(path) as file:
        assert not [name for name in file.entries if "layers." in name or "fc1" in name]
    for bits in (3, None):
        served = load_packed(path, bits=bits, model=TwoNames())
        with torch.no_grad(), bit_width(model, 3, "truncate"), bit_width(served, 3):
            assert torch.allclose(served(x), model(x), atol=1e-5 if fold else 0.0)


def test_file_with_tensors_under_second_names_loads(tmp_path):
    torch.manual_seed(0)
    path, model = tmp_path / "x.safetensors", TwoNames()
    prepare(model, norm="shared", verbose=False)
    save_packed(model.eval(), path)
    header, tensors = read_all(path)
    for name in ("float/layers.2.bias", "float/other.2.bias"):
        write_container(path, {**tensors, name: tensors["float/bn.bias"]}, header)
        if "other" in name:
            with pytest.raises(UserError, match=r"adds float/other\.2\.bias"):
                load_packed(path, model=TwoNames())
        else:
            load_packed(path, model=TwoNames())


def test_only_affine_batch_norms_are_folded(tmp_path):
    class Other(nn.Module):
        """A norm with a variance and no mean, such as EvoNorm."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
            self.register_buffer("running_var", torch.full((8,), 4.0))

        def forward(self, x):
            return x / self.running_var.sqrt() * self.weight + self.bias

    def network():
        layers = nn.Linear(8, 8), Other(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        return nn.Sequential(*layers)

    torch.manual_seed(0)
    model, x = network(), torch.randn(4, 8)
    prepare(model, norm="shared", verbose=False)
    model[1].running_var.fill_(3.0)
    model[3].running_var.fill_(5.0)
    save_packed(model.eval(), tmp_path / "x.safetensors", fold_norms=True)
    served = load_packed(tmp_path / "x.safetensors", model=network())
    assert served[1].running_var.eq(3.0).all() and served[3].running_var.lt(1.0).all()
    with torch.no_grad(), bit_width(model, 8, "truncate"):
        assert torch.allclose(served(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["layer1.0.conv1.parametrizations.weight.original", "bn1.sets.4.running_var", "fc.bias"]
)
def test_model_that_contains_nan_is_an_error(name, make, tmp_path):
    model, _ = make()
    values = dict([*model.named_parameters(), *model.named_buffers()])[name]
    with torch.no_grad():
        values.view(-1)[0] = torch.nan
    with pytest.raises(UserError, match="contains NaN"):
        save_packed(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        values.view(-1)[0] = 1.0
    save_packed(model, tmp_path / "x.safetensors")


def test_interrupted_write_keeps_the_old_file(net, packed, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(packed.read_bytes())

    def stop(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        save_packed(net[0], path, max_bits=1)
    assert path.read_bytes() == packed.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_only_requested_norm_sets_are_created(packed, net, monkeypatch):
    made = []
    real = copy.deepcopy
    monkeypatch.setattr(
        "tq_lightning.quant.switchable_norm.copy.deepcopy",
        lambda *a: made.append(type(a[0])) or real(*a),
    )
    norms = len(per_width_norms(net[0]))
    for bits, sets in ((2, {"2"}), (None, set("12345678"))):
        made.clear()
        model = load_packed(packed, bits=bits)
        assert made.count(nn.BatchNorm2d) == norms * len(sets)
        assert all(set(norm.sets) == sets for norm in per_width_norms(model))
        assert model.tq == net[0].tq


def test_header_with_a_huge_network_is_rejected_at_once(make, tmp_path):
    model, _ = make("vit_tiny_patch16_224", size=224)
    path = tmp_path / "vit.safetensors"
    for args in ({"depth": 65536}, {"embed_dim": 65472}):
        with pytest.raises(UserError, match="many times larger than its file"):
            save_packed(model, path)
            with Container(path) as file:
                header = {
                    **file.header,
                    "model": {**file.header["model"], "args": {"num_classes": 10, **args}},
                }
                tensors = {
                    name: array
                    for section in file.sections
                    for name, array in file.read(section).items()
                }
                write_container(tmp_path / "absurd.safetensors", tensors, header)
            load_packed(tmp_path / "absurd.safetensors")
    assert not torch.nn.modules.module._global_parameter_registration_hooks


@pytest.mark.parametrize("norm", ["per_width", "shared"])
def test_float64_model_of_a_float32_network_is_an_error_that_says_so(tmp_path, norm):
    model = create_model("resnet8_cifar", num_classes=4)
    prepare(model, norm=norm)
    saved = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=r"conv1.weight is float64 in the file, but not in the net"):
        save_packed(model.double(), saved, name="resnet8_cifar")
    assert not saved.exists()
    model.pretrained_cfg = {}  # without a name, the network is given to load_packed
    save_packed(model, saved)
    with pytest.raises(UserError, match=r"is float64 in the file.* of the type of the file") as got:
        load_packed(saved, model=create_model("resnet8_cifar", num_classes=4))
    assert "model_args" not in str(got.value) and "\n" not in str(got.value)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    loaded = load_packed(saved, model=create_model("resnet8_cifar", num_classes=4).double())
    with bit_width(loaded, 4), bit_width(model, 4, source="truncate"):
        assert torch.equal(loaded(images), model.eval()(images))
    save_packed(model.float(), saved, name="resnet8_cifar")
    with pytest.raises(UserError, match=r"is float64 in the network, but not in the file"):
        load_packed(saved, model=create_model("resnet8_cifar", num_classes=4).double())
