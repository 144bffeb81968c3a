"""Energy of an inference by ZigZag: shapes, sums and a real simulation."""

import importlib.util
import json

import pytest
import torch
from torch import nn

from tq_lightning.cli import main
from tq_lightning.cost import energy_inference
from tq_lightning.cost.energy_inference import LayerShape, inference_energy, layer_shapes

HAS_ZIGZAG = importlib.util.find_spec("zigzag") is not None
needs = pytest.mark.skipif(not HAS_ZIGZAG, reason="zigzag-dse is not installed")


def fake(shape, accelerator, bits):
    traffic = shape.groups * shape.out * shape.inside * bits
    return {"compute_pj": 1.0, "weights_pj": traffic + 7.0, "activations_pj": 2.0}


def test_shapes_of_convolutions_and_linear_layers():
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, (1, 3), groups=4),
            nn.Flatten(),
            nn.Linear(8 * 16 * 14, 5),
        )
    shapes = layer_shapes(net, {"0", "1", "3"}, (3, 32, 32))
    assert shapes[0] == LayerShape(1, 8, 3, 16, 16, (3, 3), (2, 2))
    assert shapes[1] == LayerShape(4, 2, 2, 16, 14, (1, 3), (1, 1))
    assert shapes[2] == LayerShape(1, 5, 1792, 1, 1, (1, 1), (1, 1))
    assert layer_shapes(net, {"1"}, (3, 32, 32)) == [shapes[1]]


def test_every_layer_counts_and_energy_is_linear_in_the_width(monkeypatch):
    monkeypatch.setattr(energy_inference, "_simulator", lambda: fake)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    energies = inference_energy(net, {"0", "1"}, (4,))
    assert energies.keys() == energy_inference.ACCELERATORS.keys()
    for energy in energies.values():
        assert [energy.by_width[n]["weights_pj"] for n in (8, 4, 2, 1)] == [270, 142, 78, 46]
        assert {row["compute_pj"] for row in energy.by_width.values()} == {2.0}


def test_inspect_prints_and_records_the_energy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(energy_inference, "_simulator", lambda: fake)
    out = tmp_path / "r8.json"
    argv = ["inspect", "--model.name", "resnet8_cifar", "--energy", "--out", str(out)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "energy of an inference on TPU-like in microjoules (modeled, not measured)" in text
    assert "zigzag-dse" in text and "not counted" in text
    record = json.loads(out.read_text())
    assert record["inference"]["Edge-TPU-like"]["by_width"].keys() == {"8", "4", "2", "1"}
    assert main(["inspect", "--model.name", "resnet8_cifar", "--out", str(out)]) == 0
    assert not json.loads(out.read_text()).get("inference")


@pytest.mark.skipif(HAS_ZIGZAG, reason="zigzag-dse is installed")
def test_missing_zigzag_error_says_what_to_install(capsys):
    assert main(["inspect", "--model.name", "resnet8_cifar", "--energy"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "pip install 'tq_lightning[energy]'" in lines[0]


@needs
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_simulated_energy_is_linear_in_the_width():
    simulate = energy_inference._simulator()
    shape = LayerShape(1, 32, 32, 4, 4, (1, 1), (1, 1))
    for accelerator in energy_inference.ACCELERATORS.values():
        cost = {bits: simulate(shape, accelerator, bits) for bits in (8, 4, 1)}
        weights = {bits: row["weights_pj"] for bits, row in cost.items()}
        assert weights[8] > weights[4] > weights[1] > 0
        line = weights[1] + 3 / 7 * (weights[8] - weights[1])
        assert weights[4] == pytest.approx(line, rel=0.02)
        assert cost[8]["compute_pj"] == cost[1]["compute_pj"] > 0
