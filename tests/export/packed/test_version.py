"""Format version 2: ranges, scales and level tables; files without them stay version 1."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.packed import resign, set_in

from tq_lightning import bit_width, load_packed, prepare, save_packed
from tq_lightning.errors import UserError
from tq_lightning.export.packed.container import Container
from tq_lightning.export.packed.edit import join, read_all, repack, write_rest
from tq_lightning.quant.level_tables import level_table

COMMITTED = Path(__file__).parents[2] / "compatibility" / "packed.safetensors"
NESTED = {"normalizer": "float_e2", "level": "native", "scale": "span"}
RANGES = {"layer1.0.conv1": (0.0, 2.5), "layer2.0.conv1": (-0.75, 1.0)}


def version(path):
    with Container(path) as file:
        return file.version


@pytest.fixture(scope="module")
def nested(make):
    return make(**NESTED)


@pytest.fixture(scope="module")
def second(nested, tmp_path_factory):
    path = tmp_path_factory.mktemp("second") / "model"
    save_packed(nested[0], path, activation_ranges=RANGES)
    return path


def test_file_without_new_features_is_version_1(net, packed, tmp_path):
    with Container(packed) as file:
        assert file.version == 1 and "activation_ranges" not in file.header
        assert sorted(file.header["prepare"]) == [
            "activations", "level", "max_bits", "norm", "normalizer", "quantizer", "skip", "ste",
            "widths",
        ]  # fmt: skip
    save_packed(net[0], tmp_path / "again", activation_ranges={})
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()
    save_packed(net[0], tmp_path / "more", activation_ranges=RANGES)
    assert version(tmp_path / "more") == 2


def test_committed_file_is_rewritten_byte_for_byte(tmp_path):
    repack(COMMITTED, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == COMMITTED.read_bytes()


@pytest.mark.parametrize(
    "choices",
    [
        NESTED,
        {"normalizer": "learned", "level": "centre", "scale": "span"},
        {"normalizer": "learned_channel", "level": "centroid", "scale": "span"},
        {"normalizer": "gaussian", "level": "centroid", "scale": "span"},
        {"normalizer": "absmax_channel", "scale": "span"},
    ],
    ids=lambda choices: choices["normalizer"],
)
@pytest.mark.parametrize("mode", ["resident", "lean"])
def test_loaded_model_equals_the_trained_model(make, tmp_path, choices, mode):
    model, images = make(**choices)
    save_packed(model, tmp_path / "m")
    assert version(tmp_path / "m") == 2
    loaded = load_packed(tmp_path / "m", mode=mode)
    with torch.no_grad():
        for bits in (8, 3, 1):
            with bit_width(model, bits, "truncate"), bit_width(loaded, bits):
                assert torch.equal(loaded(images), model(images))
        with bit_width(model, 2, "truncate"):
            only = load_packed(tmp_path / "m", bits=2, model=None)
            assert torch.equal(only(images), model(images))


def test_tables_and_ranges_are_in_the_file(second):
    header, tensors = read_all(second)
    assert header["activation_ranges"] == {name: list(pair) for name, pair in RANGES.items()}
    assert header["prepare"]["scale"] == "span"
    for bits in range(1, 9):
        expected = level_table("native", "float_e2", bits)
        np.testing.assert_array_equal(tensors[f"levels{bits}"], expected.numpy())
    loaded = load_packed(second)
    assert loaded.tq_ranges == RANGES and loaded.tq_ranges["layer2.0.conv1"].low == -0.75


def test_tables_in_the_file_take_precedence_over_the_formula(second, tmp_path, monkeypatch):
    before = load_packed(second, bits=4)
    from tq_lightning.quant import level_tables

    monkeypatch.setitem(level_tables.LEVEL_TABLES, "native", level_tables.centroids)
    level_tables.level_table.cache_clear()
    after = load_packed(second, bits=4)
    level_tables.level_table.cache_clear()
    assert torch.equal(before.layer1[0].conv1.weight, after.layer1[0].conv1.weight)


def test_narrow_and_rest_files_keep_version_2(second, tmp_path):
    repack(second, tmp_path / "four", max_bits=4)
    write_rest(second, tmp_path / "rest", 4)
    assert version(tmp_path / "four") == version(tmp_path / "rest") == 2
    assert "levels5" not in read_all(tmp_path / "four")[1]
    join(tmp_path / "four", tmp_path / "rest", tmp_path / "full")
    assert (tmp_path / "full").read_bytes() == second.read_bytes()
    assert load_packed(tmp_path / "four").tq_ranges == RANGES


def test_half_precision_keeps_the_levels(second):
    half, full = load_packed(second).half(), load_packed(second)
    for bits in (8, 3):
        with bit_width(half, bits), bit_width(full, bits):
            assert torch.equal(half.layer1[0].conv1.weight, full.layer1[0].conv1.weight.half())


def test_ranges_of_a_model_are_saved(net, tmp_path):
    model = net[0]
    model.tq_ranges = {"layer1.0.conv1": (0.0, 1.5)}
    try:
        save_packed(model, tmp_path / "m")
    finally:
        del model.tq_ranges
    assert load_packed(tmp_path / "m").tq_ranges == {"layer1.0.conv1": (0.0, 1.5)}


BAD_RANGES = {
    "a list": ([1, 2], "must map layer names"),
    "unknown layer": ({"layer9": (0, 1)}, "'layer9', which is not a quantized layer"),
    "a layer in float": ({"conv1": (0, 1)}, "'conv1', which is not a quantized layer"),
    "one number": ({"layer1.0.conv1": (1,)}, "expected two finite numbers"),
    "NaN": ({"layer1.0.conv1": (0.0, float("nan"))}, "expected two finite numbers"),
    "infinity": ({"layer1.0.conv1": (0.0, float("inf"))}, "expected two finite numbers"),
    "beyond float32": ({"layer1.0.conv1": (0.0, 1e39)}, "expected two finite numbers"),
    "text": ({"layer1.0.conv1": ("0", "1")}, "expected two finite numbers"),
    "without zero": ({"layer1.0.conv1": (1.0, 2.0)}, "expected low <= 0 <= high"),
    "reversed": ({"layer1.0.conv1": (1.0, -1.0)}, "expected low <= 0 <= high"),
}


@pytest.mark.parametrize(("ranges", "message"), BAD_RANGES.values(), ids=BAD_RANGES.keys())
def test_invalid_ranges_are_errors_on_save_and_load(net, packed, tmp_path, ranges, message):
    with pytest.raises(UserError, match=message):
        save_packed(net[0], tmp_path / "m", activation_ranges=ranges)
    assert not list(tmp_path.iterdir())
    if ranges == BAD_RANGES["infinity"][0]:
        return  # standard JSON has no infinity

    def change(metadata, index, content):
        metadata["format_version"], content["activation_ranges"] = "2", ranges

    path = tmp_path / "hostile"
    path.write_bytes(resign(packed.read_bytes(), change))
    with pytest.raises(UserError, match=message) as error:
        load_packed(path)
    assert "\n" not in str(error.value)


def rename_table(metadata, index, content):
    index["levels9"] = index.pop("levels8")
    content["checksums"]["levels9"] = content["checksums"].pop("levels8")


def shrink_table(metadata, index, content):
    index["levels8"]["shape"] = [16, 16]


def drop_scale(metadata, index, content):
    del content["prepare"]["scale"]


HOSTILE = {
    "a table of another width": (rename_table, "not a table of levels"),
    "a table of another shape": (shrink_table, "not a table of levels"),
    "no scale": (drop_scale, "is not supported with normalizer 'float_e2'"),
    "version 1 with new fields": (set_in("metadata", "format_version", "1"), "fields of version 2"),
    "unknown level": (set_in("content", "prepare", NESTED | {"level": "x"}), "unknown level 'x'"),
    "a level without tables": (
        set_in("content", "prepare", {"scale": "span"}),
        "adds levels|layer map|network",
    ),
}


@pytest.mark.parametrize(("change", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_header_is_an_error(change, match, second, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(resign(second.read_bytes(), change))
    with pytest.raises(UserError, match=match) as error:
        load_packed(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -5.0, 5.0])
def test_hostile_level_table_is_an_error(second, tmp_path, value):
    from tq_lightning.export.packed.container import write_container

    header, tensors = read_all(second)
    tensors["levels2"] = np.array([0.0, value, 0.6, 1.0], np.float32)
    write_container(tmp_path / "m", tensors, header, 2)
    with pytest.raises(UserError, match="its table of 2-bit levels"):
        load_packed(tmp_path / "m")
    load_packed(tmp_path / "m", bits=4)  # only the tables in use are read


def test_missing_choices_have_their_defaults(packed, tmp_path):
    def change(metadata, index, content):
        metadata["format_version"] = "2"
        for key in ("level", "ste", "norm"):
            del content["prepare"][key]

    (tmp_path / "m").write_bytes(resign(packed.read_bytes(), change))
    a, b = load_packed(tmp_path / "m", bits=3), load_packed(packed, bits=3)
    assert torch.equal(a.layer1[0].conv1.weight, b.layer1[0].conv1.weight)
    assert json.loads(json.dumps(a.tq)) == b.tq


def test_prepared_network_loads_a_file_of_version_1(packed):
    from tq_lightning.models import create_model

    model = create_model("resnet8_cifar", num_classes=10)
    prepare(model, verbose=False)
    load_packed(packed, model=model)
    other = create_model("resnet8_cifar", num_classes=10)
    prepare(other, scale="span", verbose=False)
    with pytest.raises(UserError, match="prepared with other options"):
        load_packed(packed, model=other)
