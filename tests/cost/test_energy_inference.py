"""Energy of an inference by ZigZag: shapes, sums and a real simulation."""

import importlib.util
import json
import re

import pytest
import torch
from torch import nn

from tq_lightning.cli import main
from tq_lightning.cost import energy_inference
from tq_lightning.cost.energy_inference import inference_energy, layer_shapes
from tq_lightning.cost.zigzag_layers import LayerShape, Simulation, simulate_all
from tq_lightning.errors import UserError

HAS_ZIGZAG = importlib.util.find_spec("zigzag") is not None
needs = pytest.mark.skipif(not HAS_ZIGZAG, reason="zigzag-dse is not installed")


def fake(simulations, progress=None):
    costs = {}
    for shape, accelerator, bits in simulations:
        traffic = shape.groups * shape.out * shape.inside * bits
        cost = {"compute_pj": 1.0, "weights_pj": traffic + 7.0, "activations_pj": 2.0}
        assert (shape, accelerator, bits) not in costs, "simulated twice"
        costs[shape, accelerator, bits] = cost
        if progress is not None:
            progress(len(costs), len(simulations))
    return costs


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setattr(energy_inference, "check_installed", lambda: None)
    monkeypatch.setattr(energy_inference, "simulate_all", fake)


def test_shapes_of_convolutions_and_linear_layers():
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, (1, 3), groups=4),
            nn.Flatten(),
            nn.Linear(8 * 16 * 14, 5),
        )
    found = layer_shapes(net, {"0", "1", "3"}, (3, 32, 32))
    assert [name for name, _ in found] == ["0", "1", "3"]
    shapes = [shape for _, shape in found]
    assert shapes[0] == LayerShape(1, 8, 3, 16, 16, (3, 3), (2, 2))
    assert shapes[1] == LayerShape(4, 2, 2, 16, 14, (1, 3), (1, 1))
    assert shapes[2] == LayerShape(1, 5, 1792, 1, 1, (1, 1), (1, 1))
    assert layer_shapes(net, {"1"}, (3, 32, 32)) == [("1", shapes[1])]


def test_every_layer_counts_and_energy_is_linear_in_the_width(simulated):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    energies = inference_energy(net, {"0", "1"}, (4,))
    assert energies.keys() == energy_inference.ACCELERATORS.keys()
    for energy in energies.values():
        assert [energy.by_width[n]["weights_pj"] for n in (8, 4, 2, 1)] == [270, 142, 78, 46]
        assert {row["compute_pj"] for row in energy.by_width.values()} == {2.0}


def test_layers_of_other_kinds_are_named(simulated):
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(1), nn.Linear(24, 2))
    for energy in inference_energy(net, {"0", "2"}, (2, 8)).values():
        assert energy.assumptions[-1] == "layers of other kinds are not counted: 0"
    with pytest.raises(UserError, match="no quantized 2-d convolution or linear layer"):
        inference_energy(net, {"0"}, (2, 8))


def test_inspect_prints_and_records_the_energy(simulated, tmp_path, capsys):
    out = tmp_path / "r8.json"
    argv = ["inspect", "--model.name", "resnet8_cifar", "--energy", "--out", str(out)]
    assert main(argv) == 0
    text, err = capsys.readouterr()
    assert re.match(r"simulated \d+ of (\d+) layers", err), err
    assert re.search(r"simulated (\d+) of \1 layers, 0:00:00 left\n$", err), err
    table = text.partition("energy of an inference on Edge-TPU-like")[2].splitlines()
    assert table[1].split() == ["bits", "compute", "weights", "activations", "total"]
    assert "energy of an inference on TPU-like in microjoules (modeled, not measured)" in text
    assert "zigzag-dse" in text and "not counted" in text
    record = json.loads(out.read_text())
    assert record["inference"]["Edge-TPU-like"]["by_width"].keys() == {"8", "4", "2", "1"}
    assert main(["inspect", "--model.name", "resnet8_cifar", "--out", str(out)]) == 0
    assert not json.loads(out.read_text()).get("inference")


@pytest.mark.parametrize(
    "name", ["sequence:cnn", "sequence:lstm", "sequence:transformer", "resnet8_cifar"]
)
def test_network_of_other_inputs_is_an_error_of_one_line(name, simulated, capsys):
    images = ":" not in name
    name = name if images else f"tq_lightning.models.{name}"
    argv = ["inspect", "--model.name", name, "--model.num_classes", "9", "--energy"]
    assert main(argv) == (0 if images else 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert images or (len(lines) == 1 and "--energy needs a network of images" in lines[0])


def test_any_error_of_the_network_is_one_line(simulated):
    class Own(nn.Linear):
        def forward(self, x):
            return {}["missing\nkey"]

    with pytest.raises(UserError, match="needs a network of images") as caught:
        inference_energy(nn.Sequential(Own(2, 2)), {"0"}, (2,))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(HAS_ZIGZAG, reason="zigzag-dse is installed")
def test_missing_zigzag_error_says_what_to_install(capsys):
    assert main(["inspect", "--model.name", "resnet8_cifar", "--energy"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "pip install 'tq_lightning[energy]'" in lines[0]


@needs
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_simulated_energy_is_linear_in_the_width():
    shape = LayerShape(1, 32, 32, 4, 4, (1, 1), (1, 1))
    accelerators = energy_inference.ACCELERATORS.values()
    costs = simulate_all([Simulation(shape, a, bits) for a in accelerators for bits in (8, 4, 1)])
    for accelerator in accelerators:
        cost = {bits: costs[shape, accelerator, bits] for bits in (8, 4, 1)}
        weights = {bits: row["weights_pj"] for bits, row in cost.items()}
        assert weights[8] > weights[4] > weights[1] > 0
        line = weights[1] + 3 / 7 * (weights[8] - weights[1])
        assert weights[4] == pytest.approx(line, rel=0.02)
        assert cost[8]["compute_pj"] == cost[1]["compute_pj"] > 0
