"""Integer models: every layer against exact integers, trained codes, norms, shortcuts, errors."""

import copy
import operator
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from fixtures.integer_oracle import compare, simulated
from torch import nn

from tq_lightning import bit_width, calibrate_activations, calibrate_norms, prepare
from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.quant.activation import ACTIVATIONS
from tq_lightning.quant.codes import LEVELS
from tq_lightning.quant.integer import integer_layers, integer_model, plan
from tq_lightning.quant.integer import model as integer
from tq_lightning.quant.integer.kernels import RELU, Conv2d, missing_kernels, sums_are_exact
from tq_lightning.quant.integer.norms import folded_norm
from tq_lightning.quant.integer.rewrite import CodePool
from tq_lightning.quant.quantized_tensors import quantized_layers

pytestmark = pytest.mark.skipif(missing_kernels() is not None, reason=str(missing_kernels()))
WIDTHS = (8, 7, 4, 2, 1)


class Mixed(nn.Module):
    """Signed inputs, groups, stride, padding, three activations, and a shortcut that is used twice.

    Shapes: (b, 3, 8, 8) -> (b, 5).
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)  # reads signed values
        self.bn = nn.BatchNorm2d(8)
        self.swish = nn.Hardswish()
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.down = nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc1, self.gelu, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.swish(self.bn(self.grouped(x)))
        z = self.relu(self.bn2(self.wide(y)) + y)
        z = self.down(z) + y[:, :, 1:7:2, 1:7:2]  # y is used after the first sum
        return self.fc2(self.drop(self.gelu(self.fc1(self.pool(z).flatten(1)))))


class Grouped(nn.Module):
    """Plain, grouped and depthwise convolutions, and a linear layer, with norms of both signs."""

    def __init__(self):
        super().__init__()
        sizes = ((3, 8, 1), (8, 8, 1), (8, 8, 4), (8, 16, 8))
        layers = []
        for width, out, groups in sizes:
            layers += [nn.Conv2d(width, out, 3, padding=1, groups=groups)]
            layers += [nn.BatchNorm2d(out), nn.ReLU()]
        head = nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 5)
        self.layers = nn.Sequential(*layers, *head)

    def forward(self, x):
        return self.layers(x)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        return self.c(self.b(x) if x.sum() > -1e9 else x)


def prepare_with_statistics(model, images, **how):
    """Prepare a model and give it norm statistics at every width."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            with torch.no_grad():
                module.weight[0] = 0.0  # its channel is the bias
    prepare(model, verbose=False, **how)
    model.train()
    with torch.no_grad():
        for bits in model.tq["widths"]:
            with bit_width(model, bits):
                model(images)
    calibrate_norms(model.eval(), [[images]])
    return model


def random_images(size=8):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))


def logits_at(model, images, bits):
    with torch.inference_mode(), bit_width(model, bits, "truncate"):
        return model(images)


CASES = {  # name -> (make, image size, arguments of prepare)
    "residual": (lambda: create_model("resnet8_cifar"), 16, {}),
    "mixed": (Mixed, 8, {"level": "centre"}),
    "mixed, left": (Mixed, 8, {"level": "left", "normalizer": "absmax_channel"}),
    "transformer": (
        lambda: create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24),
        32,
        {},
    ),
    "depthwise": (lambda: create_model("mobilenetv3_small_050"), 32, {}),
    "trained": (lambda: create_model("resnet8_cifar"), 16, {"activations": "pact_floor"}),
    "trained, pre-activation": (
        lambda: create_model("preresnet20_cifar"),
        16,
        {"activations": "clamp_round_truncate", "skip": ("first", "last", "*skip_conv")},
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c == "depthwise" else ()) for c in CASES]
)
def test_every_layer_equals_exact_integer_arithmetic(case):
    """Codes differ by at most 1, and only if the exact value is within 1e-3 of a half."""
    make, size, how = CASES[case]
    torch.manual_seed(0)
    images = random_images(size)
    model = prepare_with_statistics(make(), images, **how)
    if "activations" not in how:
        calibrate_activations(model, [images])
    quantized = len(quantized_layers(model))
    run = integer_model(copy.deepcopy(model))
    assert len(integer_layers(run)) == quantized
    assert f"{quantized} of {len(run.layers)} layers run on integers; in float" in run.summary()
    for bits in WIDTHS:
        with torch.inference_mode(), bit_width(run, bits, "truncate"):
            found = compare(run, images)
        assert len(found) == quantized
        outputs, off, wrong = (sum(part) for part in zip(*found.values(), strict=True))
        assert wrong == 0, {name: a for name, a in found.items() if a.wrong}
        assert off <= 1e-3 * outputs
        assert logits_at(run, images, bits).isfinite().all()


def test_exact_reference_detects_a_wrong_weight():
    images = random_images()
    model = prepare_with_statistics(Mixed(), images)
    calibrate_activations(model, [images])
    run = integer_model(model)
    logits_at(run, images, 4)
    with bit_width(run, 4, "truncate"):
        layer = next(m for m in integer_layers(run) if m.name == "wide")
        layer._prepacked.integers[0, 0, 0, 0] += 2
        found = compare(run, images)
    assert [name for name, agreement in found.items() if agreement.wrong] == ["wide"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_trained_activation_codes_equal_their_simulation(kind, level):
    images = random_images(16)
    torch.manual_seed(0)
    model = prepare_with_statistics(
        create_model("resnet8_cifar"), images, activations=kind, level=level
    )
    run = integer_model(copy.deepcopy(model))
    for bits in (8, 4, 3, 2, 1):
        expected, got = logits_at(model, images, bits), logits_at(run, images, bits)
        # a sum at a bin edge may round either way in float32, which changes few logits slightly
        near = (got - expected).abs() < 1e-4 * expected.abs().max()
        assert bits == 8 or near.float().mean() >= 0.5
        assert (got - expected).norm() < (3e-3 if bits == 8 else 0.03) * expected.norm()


@pytest.mark.parametrize("exact_sums", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_8_bit_integer_layers_equal_float_layers_on_the_same_codes(level, exact_sums):
    """In float64, codes differ by 1, and only within 1e-3 of a half; nearest int8 differs more."""
    images = random_images()
    how = {"level": level, "activations": "pact_round", "normalizer": "absmax_channel"}
    model = prepare_with_statistics(Grouped(), images, **how)
    counts = {}
    for exact in (None, False):
        run = integer_model(copy.deepcopy(model), exact_sums, exact)
        with bit_width(run, 8, "truncate"):
            counts[exact] = compare(run, images)
            wrong = {}
            for layer in integer_layers(run):
                weight = layer.layer.weight.detach().double()
                factor, _ = folded_norm(layer.norm, len(weight))
                weight = weight.flatten(1) * factor[:, None]
                built = layer._prepacked
                integers = built.integers.double().flatten(1) + built.offset[:, None]
                error = (built.gain[:, None] * integers - weight).abs().max() / weight.abs().max()
                wrong[layer.name] = float(error) > 1e-6
        assert any(wrong.values()) == (exact is False and exact_sums)
        outputs, ties, others = (sum(p) for p in zip(*counts[exact].values(), strict=True))
        if sums_are_exact() or not exact_sums:
            assert others == 0 and ties <= 1e-3 * outputs


def test_calibrated_logits_are_close_to_float_but_wrong_ranges_are_not():
    images = random_images(16)
    torch.manual_seed(0)
    model = prepare_with_statistics(create_model("resnet8_cifar"), images)
    ranges = calibrate_activations(model, [images])
    run = integer_model(copy.deepcopy(model))
    model.tq_ranges = {name: (0.0, 40 * high) for name, (_, high) in ranges.items()}
    coarse = integer_model(copy.deepcopy(model))
    for bits in WIDTHS:
        expected = logits_at(model, images, bits)
        error = (logits_at(run, images, bits) - expected).norm() / expected.norm()
        assert error < 0.05 < (logits_at(coarse, images, bits) - expected).norm() / expected.norm()


def test_switching_widths_does_not_change_the_logits_of_a_width():
    images = random_images()
    model = prepare_with_statistics(Mixed(), images)
    calibrate_activations(model, [images])
    run = integer_model(copy.deepcopy(model))
    first = {bits: logits_at(run, images, bits) for bits in WIDTHS}
    for bits in reversed(WIDTHS):
        alone = copy.deepcopy(run)
        assert torch.equal(logits_at(alone, images, bits), first[bits])
        assert torch.equal(logits_at(run, images, bits), first[bits])
    assert not torch.equal(first[8], first[4])
    with pytest.raises(ValueError, match="unknown width 9"), bit_width(run, 9, "truncate"):
        pass


def test_batch_size_does_not_change_the_logits_of_an_image():
    images = random_images()
    model = prepare_with_statistics(Mixed(), images)
    calibrate_activations(model, [images])
    run = integer_model(model)
    whole = logits_at(run, images, 4)
    rows = torch.cat([logits_at(run, images[i : i + 1], 4) for i in range(len(images))])
    assert torch.allclose(whole, rows, atol=1e-6)
    with torch.inference_mode(), bit_width(run, 4, "truncate"), simulated(run):
        assert torch.allclose(run(images), whole, atol=1e-4)


def test_weights_that_could_saturate_are_split(monkeypatch):
    """On a processor that adds in 16 bits, trained 8-bit codes run as two kernels."""
    images = random_images(16)
    torch.manual_seed(0)
    model = prepare_with_statistics(create_model("resnet8_cifar"), images, activations="pact_round")
    safe = integer_model(copy.deepcopy(model), exact_sums=False)
    for bits, split in ((8, True), (7, False), (2, False)):
        with torch.inference_mode(), bit_width(safe, bits, "truncate"):
            found = compare(safe, images)
            assert all(a.wrong == 0 for a in found.values())
            assert [m._prepacked.second is not None for m in integer_layers(safe)] == [split] * 6


def test_calibrated_codes_are_limited_to_127_if_sums_could_saturate():
    images = random_images(16)
    torch.manual_seed(0)
    model = prepare_with_statistics(create_model("resnet8_cifar"), images)
    calibrate_activations(model, [images])
    tops = {}
    for exact in (True, False):
        run = integer_model(copy.deepcopy(model), exact_sums=exact)
        for bits in WIDTHS:
            logits_at(run, images, bits)
            tops[exact, bits] = {m._prepacked.into.top for m in integer_layers(run)}
    assert all(tops[True, bits] == {255} for bits in WIDTHS)
    assert [tops[False, bits] for bits in WIDTHS] == [{127}, {127}, {255}, {255}, {255}]


def test_untraceable_model_runs_layer_by_layer():
    torch.manual_seed(0)
    model, x = Untraceable(), torch.randn(6, 8)
    prepare(model, verbose=False, skip=())
    calibrate_activations(model.eval(), [x])
    run = integer_model(copy.deepcopy(model))
    assert len(integer_layers(run)) == 3 and "3 of 3" in run.summary()
    for bits in WIDTHS:
        expected = logits_at(model, x, bits)
        assert (logits_at(run, x, bits) - expected).norm() < 0.03 * expected.norm()


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight)


class FromInput(nn.Module):
    """Call `own` with the network and its input, to choose what the rest of it reads."""

    def __init__(self, own):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.own, self.head = nn.BatchNorm2d(8), own, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.own(self, x).mean((2, 3)))

    def features(self, x):
        return torch.relu(self.conv(torch.relu(self.stem(x))))


def check_of_type(net, x):
    if not isinstance(x, torch.Tensor) or isinstance(x, torch.fx.Proxy):
        raise ValueError(f"expected a tensor, got {type(x).__name__}")
    return net.features(x)


FROM_INPUT = {  # name -> (own, input for images, True if it can be traced)
    "mapping": (lambda net, x: net.features(x["images"]), lambda x: {"images": x}, True),
    "list": (lambda net, x: net.features(x[0]), lambda x: [x], True),
    "number": (lambda net, x: net.conv(torch.relu(net.stem(x))) + x.shape[1], None, True),
    "own check": (check_of_type, None, False),
    "parameter of a norm": (
        lambda net, x: net.bn(net.features(x)) * net.bn.weight.view(-1, 1, 1),
        None,
        False,
    ),
    "statistics of a norm": (
        lambda net, x: net.bn(net.features(x)) * net.bn.running_var.sqrt().view(-1, 1, 1),
        None,
        False,
    ),
}


@pytest.mark.parametrize("case", FROM_INPUT)
def test_model_runs_on_integers_at_every_width_whatever_it_reads(case):
    torch.manual_seed(0)
    own, wrap, traced = FROM_INPUT[case]
    images = random_images()
    x = images if wrap is None else wrap(images)
    model = prepare_with_statistics(FromInput(own), x)
    with torch.no_grad():
        for bits, norm in enumerate(model.bn.sets.values(), 1):
            norm.weight.fill_(bits)
    calibrate_activations(model, [[x]])
    run = integer_model(copy.deepcopy(model))
    assert isinstance(run.network, torch.fx.GraphModule) == traced
    assert [layer.name for layer in integer_layers(run)] == ["conv"]
    for bits in (8, 4, 1):
        expected = logits_at(model, x, bits)
        assert (logits_at(run, x, bits) - expected).norm() < 0.03 * expected.norm()


def test_layers_without_an_integer_kernel_are_named_and_stay_in_float():
    layers = OrderedDict(
        stem=nn.Conv2d(3, 4, 3),
        own=OwnForward(4, 4, 2),
        up=nn.ConvTranspose2d(4, 4, 2),
        reflect=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        fine=nn.Conv2d(4, 4, 3),
    )
    model, images = nn.Sequential(layers), random_images()
    prepare(model, verbose=False, skip=("first",))
    calibrate_activations(model.eval(), [images])
    run = integer_model(copy.deepcopy(model))
    assert [m.name for m in integer_layers(run)] == ["fine"]
    assert run.layers["own"] == "OwnForward overrides forward"
    assert run.layers["up"] == "ConvTranspose2d has no integer kernel"
    assert run.layers["reflect"].startswith("its padding is reflect")
    assert run.summary().startswith("1 of 5 layers run on integers; in float: stem (not quantized)")
    expected = logits_at(model, images, 4)
    assert (logits_at(run, images, 4) - expected).norm() < 0.03 * expected.norm()


def test_invalid_input_is_an_error(monkeypatch):
    images = random_images()
    model = prepare_with_statistics(Mixed(), images)
    with pytest.raises(UserError, match=r"no activation ranges.*--calibrate"):
        integer_model(model)
    calibrate_activations(model, [images])
    del model.tq_ranges["wide"]
    assert integer_model(copy.deepcopy(model)).layers["wide"] == "no activation range"
    monkeypatch.setattr(
        plan,
        "signed_level",
        lambda *_: (_ for _ in ()).throw(ValueError("level 'x' has no integer form")),
    )
    with pytest.raises(UserError, match=r"no layer can run on integers.*level 'x'"):
        integer_model(copy.deepcopy(model))
    monkeypatch.setattr(integer, "missing_kernels", lambda: "it was built without oneDNN")
    with pytest.raises(UserError, match="not available: it was built without oneDNN"):
        integer_model(model)


def test_max_pooling_keeps_codes_as_integers():
    """PyTorch pools uint8 tensors only up to 255 values per image."""
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Flatten()
    model, images = nn.Sequential(*layers, nn.Linear(1352, 3)), random_images(32)
    prepare(model, verbose=False, skip=("first",), activations="clamp_round")
    run = integer_model(copy.deepcopy(model.eval()))
    assert any(isinstance(m, CodePool) for m in run.modules())
    for bits in (4, 1):
        assert torch.allclose(
            logits_at(run, images, bits), logits_at(model, images, bits), atol=1e-5
        )


def test_only_slices_that_select_everything_are_removed():
    images = random_images(32)
    model = prepare_with_statistics(create_model("resnet8_cifar", num_classes=3), images)
    calibrate_activations(model, [images])
    run = integer_model(model)
    slices = [n.args[1][2:] for n in run.network.graph.nodes if n.target is operator.getitem]
    assert slices == [(slice(None, None, 2), slice(None, None, 2))] * 2  # of the two strided blocks


def test_deepcopy_does_not_copy_the_kernel_cache():
    weight = torch.ones(2, 2, 1, 1, dtype=torch.int8)
    one = torch.ones(2)
    kernel = Conv2d(weight, one, 0 * one, (1, 2, 3, 3), (1, 1), (0, 0), (1, 1), 1, 0.5)
    a = torch.full((1, 2, 3, 3), 3, dtype=torch.uint8)
    assert (kernel(a, None) == 3.0).all()
    images = random_images()
    model = prepare_with_statistics(Mixed(), images)
    calibrate_activations(model, [images])
    run = integer_model(model)
    before = logits_at(run, images, 2)
    assert all(m._prepacked is not None for m in integer_layers(run))
    copied = copy.deepcopy(run)
    assert all(m._prepacked is None for m in integer_layers(copied))
    assert torch.equal(logits_at(copied, images, 2), before)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(input=self.a(input=x))
        return self.c(torch.flatten(input=self.b(input=x), start_dim=1))


def test_layers_called_by_keyword_run_on_integers():
    torch.manual_seed(0)
    model, x = ByKeyword(), torch.rand(6, 8)
    run = integer_copy(model, x)
    assert [layer.name for layer in integer_layers(run)] == ["b"]
    assert torch.allclose(logits_at(run, x, 4), logits_at(model, x, 4), atol=1e-2)


class Named(nn.Module):
    """Modules with the names of functions that integer mode knows."""

    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu, self.view = act, nn.Tanh()

    def forward(self, x):
        return self.c(self.view(self.relu(self.b(self.a(x)))))


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.PReLU(init=0.7), nn.ReLU()])
def test_activation_is_chosen_by_type_and_not_by_name(act):
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    model = Named(act)
    run = integer_copy(model, x)
    (layer,) = integer_layers(run)
    is_relu = isinstance(act, nn.ReLU)
    assert (layer.act == RELU) == is_relu
    logits = logits_at(model, x, 4)
    assert torch.allclose(logits_at(run, x, 4), logits, atol=1e-2)
    model.relu = nn.ReLU()  # another network, unless it has a ReLU
    assert torch.allclose(logits_at(model, x, 4), logits, atol=1e-2) == is_relu


class Tokens(nn.Module):
    """A linear layer on (b, 16, 8), then a batch norm of its 16 tokens or of its 16 outputs."""

    def __init__(self, by_output=False):
        super().__init__()
        self.stem, self.fc, self.bn = nn.Linear(8, 8), nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.head, self.by_output = nn.Linear(16, 4), by_output
        nn.init.uniform_(self.bn.weight, 0.2, 3.0)
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        x = self.fc(torch.relu(self.stem(x)))
        x = self.bn(x.transpose(1, 2)).transpose(1, 2) if self.by_output else self.bn(x)
        return self.head(torch.relu(x).mean(1))


def integer_copy(model, x, **how):
    """Prepare a model, calibrate it unless its activations are trained, and copy it to integers."""
    prepare(model.eval(), verbose=False, **how)
    if "activations" not in how:
        calibrate_activations(model, [x])
    return integer_model(copy.deepcopy(model))


def test_norm_over_tokens_is_not_folded_into_a_linear_layer():
    torch.manual_seed(0)
    x = torch.rand(4, 16, 8)
    models = [Tokens(), Tokens(by_output=True)]
    models[1].load_state_dict(models[0].state_dict())
    logits = []
    for model in models:
        run = integer_copy(model, x, norm="shared")
        (layer,) = integer_layers(run)
        assert layer.norm is None
        logits.append(logits_at(model, x, 4))
        assert torch.allclose(logits_at(run, x, 4), logits[-1], atol=1e-3)
    assert not torch.allclose(*logits, atol=0.1)  # a norm of the outputs is another network
    convolutions = integer_copy(Grouped(), random_images(), norm="shared")
    assert integer_layers(convolutions)[0].norm is not None


class Reshaped(nn.Module):
    """Tensors of computed size: the size is a value of the network, and not a code."""

    def __init__(self, reshape):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.fc, self.head, self.reshape = nn.Linear(512, 16), nn.Linear(16, 4), reshape

    def forward(self, x):
        x = self.reshape(self.act2(self.conv(self.act(self.stem(x)))))
        return self.head(self.act3(self.fc(x)))


def sliced(x):
    b, c, h, w = x.shape
    return x[:, :, : 2 * (h // 2)].reshape(b, c * h * w)


def untraced_view(x):
    return x.view(x.size(0), -1) if x.sum() > -1e9 else x


RESHAPES = {
    "size": lambda x: x.view(x.size(0), -1),
    "shape": lambda x: x.view(x.shape[0], x.shape[1] * 64),
    "slices": sliced,
    "not traced": untraced_view,
}


@pytest.mark.parametrize("activations", [None, "clamp_round", "pact_floor"])
@pytest.mark.parametrize("case", RESHAPES)
def test_sizes_are_not_read_as_codes(case, activations):
    torch.manual_seed(0)
    images, how = random_images(), {} if activations is None else {"activations": activations}
    model = Reshaped(RESHAPES[case])
    if case == "not traced" and activations is not None:
        with pytest.raises(UserError, match="Reshaped cannot be traced"):
            integer_copy(model, images, **how)
        return
    run = integer_copy(model, images, **how)
    assert [layer.name for layer in integer_layers(run)] == ["conv", "fc"]
    for bits in (8, 2):
        expected = logits_at(model, images, bits)
        assert (logits_at(run, images, bits) - expected).norm() < 0.01 * expected.norm()


class Broadcast(nn.Module):
    """Sums whose shortcut has another shape than the output of the convolution."""

    def __init__(self, add):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.gate, self.pool = nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1)
        self.pos, self.add = nn.Parameter(torch.randn(8, 1, 1)), add
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.conv(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.add(self, y)).mean((2, 3)))


SUMS = {
    "pooled": lambda net, y: y + net.gate(net.pool(y)),
    "parameter": lambda net, y: net.gate(y) + net.pos,
    "computed parameter": lambda net, y: net.gate(y) + net.pos.exp(),
    "first image": lambda net, y: net.gate(y) + y[:1],
    "mask": lambda net, y: net.gate(y) + (y > 0),
    "equal": lambda net, y: net.gate(y) + y,
}


@pytest.mark.parametrize("level", ["endpoint", "left"])
@pytest.mark.parametrize("case", SUMS)
def test_sum_of_different_shapes_is_added_in_float(case, level):
    torch.manual_seed(0)
    images = random_images()
    model = Broadcast(SUMS[case])
    run = integer_copy(model, images, level=level)
    layer = integer_layers(run)[1]
    added = []
    layer.in_parts = lambda *args: added.append(args) or type(layer).in_parts(layer, *args)
    for bits in (8, 4):
        added.clear()
        expected = logits_at(model, images, bits)
        assert (logits_at(run, images, bits) - expected).norm() < 0.01 * expected.norm()
        with bit_width(run, bits, "truncate"):
            assert all(a.wrong == 0 for a in compare(run, images).values())
    # a parameter is added by another node
    assert bool(added) == (case not in ("equal", "parameter"))


class Encoder(nn.Module):
    """`nn.TransformerEncoderLayer` reads the weights of its layers without calling them."""

    def __init__(self, middle=None, untraced=False):
        super().__init__()
        self.stem, self.middle = nn.Linear(8, 16), middle or nn.Identity()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head, self.untraced = nn.Linear(16, 4), untraced

    def forward(self, x):
        x = self.encoder(self.middle(self.stem(x)))
        if self.untraced and x.sum() > 1e9:
            return x
        return self.head(x.mean(1))


@pytest.mark.parametrize("untraced", [False, True])
def test_layers_inside_a_module_of_pytorch_are_counted_as_float(untraced):
    torch.manual_seed(0)
    x = torch.rand(4, 5, 8)
    with pytest.raises(UserError, match="no layer can run on integers"):
        integer_copy(Encoder(untraced=untraced), x)
    model = Encoder(nn.Linear(16, 16), untraced)
    run = integer_copy(model, x)
    assert [layer.name for layer in integer_layers(run)] == ["middle"]
    assert run.summary().startswith("1 of 7 layers run on integers")
    for name in ("linear1", "linear2"):
        assert run.layers[f"encoder.{name}"] == "is not called as a module"
    expected = logits_at(model, x, 4)
    assert (logits_at(run, x, 4) - expected).norm() < 0.01 * expected.norm()


def test_float_width_is_an_error_in_integer_mode():
    torch.manual_seed(0)
    x = torch.rand(6, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    run = integer_copy(model, x)
    with pytest.raises(ValueError, match="integer mode has no float width; pass bits from 1 to 8"):
        logits_at(run, x, None)
    assert logits_at(run, x, 8).isfinite().all()
    assert logits_at(model, x, None).isfinite().all()  # the prepared model has its float weights


@pytest.mark.parametrize("quantizer", ["round", "floor"])
def test_source_selects_the_codes_of_the_weights(quantizer):
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    run = integer_copy(model, x, quantizer=quantizer, norm="shared")
    logits = {}
    for source in ("quantize", "truncate", None):
        with torch.inference_mode(), bit_width(model, 2, source):
            expected = model(x)
        with torch.inference_mode(), bit_width(run, 2, source):
            logits[source] = run(x)
        assert torch.allclose(logits[source], expected, atol=2e-3)
    assert torch.equal(logits[None], logits["quantize"])
    assert torch.allclose(logits["truncate"], logits["quantize"], atol=2e-3) == (
        quantizer == "floor"
    )


@pytest.mark.parametrize("traced", [True, False])
def test_input_of_another_shape_is_an_error_of_one_line(traced, monkeypatch):
    if not traced:
        monkeypatch.setattr(integer, "rewrite", lambda plan: None)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    prepare(net, skip=())
    calibrate_activations(net, [torch.rand(4, 3, 4, 4)])
    model = integer_model(net)
    takes = r"layer 0 takes an input of shape \(batch, 3, height, width\), got "
    for shape, got in (
        ((3, 4, 4), takes + r"\(3, 4, 4\); pass a batch"),
        ((2, 4, 4, 4), takes + r"\(2, 4, 4, 4\)"),
        ((1, 2, 3, 4, 4), takes),
        ((2, 3, 5, 4), r"layer 3 takes an input of shape \(..., 32\), got \(2, 48\)"),
    ):
        with pytest.raises(UserError, match=got) as caught, bit_width(model, 4):
            model(torch.rand(shape))
        assert "\n" not in str(caught.value)
    with bit_width(model, 4):
        assert model(torch.rand(2, 3, 4, 4)).shape == (2, 4)


def test_model_that_is_a_single_layer_has_a_name_in_the_message():
    layer = nn.Linear(8, 4)
    prepare(layer, skip=())
    calibrate_activations(layer, [torch.rand(4, 8)])
    with pytest.raises(UserError, match=r"\(root\): it is the whole model; put it into nn.Seq"):
        integer_model(layer)


@pytest.mark.parametrize("name", ["stem", "grouped", "bn", "relu", "drop", "fc1"])
def test_forward_hooks_run_in_integer_mode(name):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    model = Mixed()
    prepare(model, norm="shared", verbose=False)
    model.get_submodule(name).register_forward_hook(lambda module, args, out: 3 * out)
    calibrate_activations(model, [x])
    model.eval()
    run = integer_model(copy.deepcopy(model))
    assert run.layers.get(name) in (None, "not quantized", "has forward hooks")
    expected = logits_at(model, x, 8)
    assert (logits_at(run, x, 8) - expected).abs().max() < 0.02 * expected.abs().max()
