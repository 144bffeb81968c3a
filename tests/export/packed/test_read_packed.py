"""docs/read_packed.py against the library: the same integers and weights, bit for bit."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tq_lightning import bit_width, load_packed, save_packed
from tq_lightning.export.packed.edit import write_rest
from tq_lightning.export.packed.weight import packed_weights

READER = Path(__file__).parents[3] / "docs" / "read_packed.py"


@pytest.fixture(scope="module")
def reader():
    spec = importlib.util.spec_from_file_location("read_packed", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reader_is_short_and_does_not_import_the_library():
    text = READER.read_text()
    assert len(text.splitlines()) < 150
    assert (
        "import torch" not in text
        and "import tq_lightning" not in text
        and "from tq_lightning" not in text
    )


CHOICES = [
    {"level": level, "normalizer": "tanh_channel"} for level in ("endpoint", "left", "centre")
] + [{"level": "centroid", "normalizer": "gaussian", "scale": "span"}]


@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: choices["level"])
@pytest.mark.parametrize("compress", [False, True])
def test_codes_weights_and_norms_equal_those_of_the_library(
    make, reader, choices, compress, tmp_path
):
    model, _ = make(**choices)
    path = tmp_path / "m.safetensors"
    ranges = {"layer1.0.conv1": (-0.5, 2.0)} if "scale" in choices else {}
    save_packed(model, path, compress=compress, activation_ranges=ranges)
    assert reader.activation_ranges(path) == ranges
    served = load_packed(path)
    for bits in (1, 3, 8):
        codes, weights, norms = (
            reader.read(path, bits),
            reader.weights(path, bits),
            reader.norms(path, bits),
        )
        with bit_width(served, bits):
            for weight in packed_weights(served):
                name, module, tensor = weight.name, weight.module, weight.tensor
                stored = module.parametrizations[tensor].original.numpy()
                np.testing.assert_array_equal(codes[name][0], stored >> (8 - bits))
                np.testing.assert_array_equal(weights[name], getattr(module, tensor).numpy())
        np.testing.assert_array_equal(
            norms["bn1.running_var"], model.bn1.sets[str(bits)].running_var.numpy()
        )


def test_damage_is_detected(reader, packed, tmp_path):
    raw = bytearray(packed.read_bytes())
    raw[-1] ^= 1
    (tmp_path / "m").write_bytes(raw)
    reader.read(tmp_path / "m", 7)  # the last plane is not read
    with pytest.raises(ValueError, match="plane7 is damaged"):
        reader.read(tmp_path / "m", 8)
    with pytest.raises(ValueError, match="stores 8"):
        reader.read(packed, 9)


def test_invalid_command_line_is_one_line_and_status_2(reader, packed, tmp_path, capsys):
    """Wrong arguments and files give one line and exit status 2."""
    assert reader.main([str(packed), "2"]) == 0
    assert "conv1.weight" in capsys.readouterr().out
    for args in ([], [str(packed)], [str(packed), "two"], [str(packed), "2", "3"]):
        assert reader.main(args) == 2
        assert capsys.readouterr().err == "usage: python read_packed.py FILE BITS\n"
    (tmp_path / "text").write_text("not a packed file")
    for args in ([str(packed), "9"], [str(tmp_path / "text"), "2"], [str(tmp_path / "none"), "2"]):
        assert reader.main(args) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "index",
    [
        None,
        [1],
        {"__metadata__": []},
        {"__metadata__": {"format": "tq_packed", "format_version": "1", "header_sha256": 5}},
        {"__metadata__": {"format": "tq_packed", "format_version": "1"}},
    ],
)
def test_malformed_header_is_one_line_and_status_2(reader, index, tmp_path, capsys):
    raw = json.dumps(index).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert reader.main([str(tmp_path / "x"), "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("end", "message"),
    [(5, "not a safetensors"), (100, "cut off inside its header"), (20_000, "is damaged")],
)
def test_truncated_file_is_named_as_such(reader, packed, tmp_path, capsys, end, message):
    (tmp_path / "x").write_bytes(packed.read_bytes()[:end])
    assert reader.main([str(tmp_path / "x"), "8"]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "x").write_bytes((50).to_bytes(8, "little") + b"#" * 100)
    assert reader.main([str(tmp_path / "x"), "8"]) == 2
    assert "not a safetensors file, or cut off" in capsys.readouterr().err


def test_rest_file_is_named(reader, packed, tmp_path, capsys):
    write_rest(packed, tmp_path / "rest", 4)
    assert reader.main([str(tmp_path / "rest"), "2"]) == 2
    assert "a rest file" in capsys.readouterr().err
