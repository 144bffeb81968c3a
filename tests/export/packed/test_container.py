"""Damaged, foreign, newer and hostile files raise a UserError and never return a model."""

import os

import numpy as np
import pytest
import torch
from fixtures.packed import resign, set_in

from tq_lightning import load_packed
from tq_lightning.errors import UserError
from tq_lightning.export.packed.container import Container, write_container
from tq_lightning.export.packed.edit import read_all


def stretch(metadata, index, content):
    index["plane7"]["shape"] = [1 << 47]
    index["plane7"]["data_offsets"][1] = index["plane7"]["data_offsets"][0] + (1 << 47)


def overlap(metadata, index, content):
    index["plane1"]["data_offsets"] = index["plane0"]["data_offsets"]


def swap_planes(metadata, index, content):
    index["plane0"], index["plane1"] = index["plane1"], index["plane0"]


def invalid_layer(metadata, index, content):
    content["layers"][0]["shape"] = [1 << 40, 1 << 7]


def moved_layer(metadata, index, content):
    content["layers"][0]["offset"], content["layers"][1]["offset"] = 64, 0


def double_layer(metadata, index, content):
    content["layers"].append(dict(content["layers"][0]))


def other_widths(metadata, index, content):
    content["norm_widths"] = [1, 2]


def too_wide(metadata, index, content):
    content["prepare"]["max_bits"], content["prepare"]["widths"] = 4, [4]


def plane_of_floats(metadata, index, content):
    begin, end = index["plane0"]["data_offsets"]
    index["plane0"] |= {"dtype": "F32", "shape": [(end - begin) // 4]}


def norms_of_none(metadata, index, content):
    content["norms"] = []


HOSTILE = {
    "newer": (set_in("metadata", "format_version", "3"), "format version '3'"),
    "foreign": (set_in("metadata", "format", "pt"), "has format 'pt'"),
    "absurd shape": (stretch, "its header describes"),
    "overlap": (overlap, "overlap"),
    "planes swapped": (swap_planes, "checksum|not contiguous"),
    "absurd layer": (invalid_layer, "layer map"),
    "layer moved": (moved_layer, "overlap or leave a gap"),
    "layer twice": (double_layer, "layer map"),
    "norm sets gone": (other_widths, "adds norm3"),
    "unknown model": (
        set_in("content", "model", {"name": "resnet8_cifra", "args": {}}),
        "unknown model 'resnet8_cifra'",
    ),
    "model from a hub": (
        set_in("content", "model", {"name": "hf-hub:a/b", "args": {}}),
        "does not name a timm model",
    ),
    "model from a path": (
        set_in("content", "model", {"name": "local-dir:/tmp", "args": {}}),
        "does not name a timm model",
    ),
    "weights from a path": (
        set_in("content", "model", {"name": "resnet8_cifar", "args": {"checkpoint_path": "x"}}),
        "disallowed model argument",
    ),
    "weights fetched": (
        set_in("content", "model", {"name": "resnet8_cifar", "args": {"pretrained": True}}),
        "disallowed model argument",
    ),
    "path as argument": (
        set_in("content", "model", {"name": "resnet8_cifar", "args": {"block": "../x"}}),
        "disallowed model argument",
    ),
    "absurd classes": (
        set_in("content", "model", {"name": "resnet8_cifar", "args": {"num_classes": 1 << 40}}),
        "disallowed model argument",
    ),
    "other classes": (
        set_in("content", "model", {"name": "resnet8_cifar", "args": {"num_classes": 11}}),
        r"fc\.\w+ has shape",
    ),
    "other network": (
        set_in("content", "model", {"name": "resnet20_cifar", "args": {}}),
        "layer map|compared with the network",
    ),
    "no network": (set_in("content", "model", {"name": None, "args": {}}), "model="),
    "unknown quantizer": (
        set_in("content", "prepare", {"quantizer": "pickle"}),
        "unknown quantizer",
    ),
    "unknown key": (set_in("content", "prepare", {"hook": "os.system"}), "can't be prepared"),
    "unknown coding": (set_in("content", "compression", "lzma"), "unknown compression 'lzma'"),
    "more planes": (set_in("content", "stored_bits", 9), "planes"),
    "fewer planes": (set_in("content", "stored_bits", 3), "does not store"),
    "more codes": (set_in("content", "codes", 1 << 40), "codes"),
    "unknown type": (
        set_in("content", "dtypes", {"fc.weight": "load"}),
        "invalid dtype",
    ),
    "a quantized type": (set_in("content", "dtypes", {"fc.weight": "quint8"}), "invalid dtype"),
    "a type of another kind": (
        set_in("content", "dtypes", {"layer1.0.conv1.weight": "int8"}),
        "invalid dtype",
    ),
    "duplicate name": (
        set_in("content", "model", {"name": "resnet8_cifar", "args": {"name": "x"}}),
        "disallowed model argument",
    ),
    "planes wider than codes": (too_wide, "8 planes of 4-bit codes"),
    "a plane of floats": (plane_of_floats, "has the wrong type"),
    "norm rows without a layout": (norms_of_none, "compared with the network"),
    "duplicate norm widths": (set_in("content", "norm_widths", [1, 2, 2]), "not unique"),
    "norms of a missing width": (set_in("content", "norm_widths", [9]), "does not store"),
    "class names that are numbers": (set_in("content", "class_names", [1, 2]), "class names"),
    "huge images": (
        set_in("content", "preprocessing", {"input_size": [3, 1 << 40, 8]}),
        "input_size",
    ),
    "mean of strings": (
        set_in("content", "preprocessing", {"input_size": [3, 8, 8], "mean": ["a"] * 3}),
        "that is not a number",
    ),
    "unknown crop mode": (set_in("content", "preprocessing", {"crop_mode": "os"}), "crop_mode"),
    "no layers": (set_in("content", "layers", None), "no valid 'layers'"),
}


@pytest.mark.parametrize(("change", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_header_is_an_error(change, match, packed, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(resign(packed.read_bytes(), change))
    with pytest.raises(UserError, match=match):
        load_packed(path)


def test_header_with_a_recomputed_checksum_loads(packed, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(resign(packed.read_bytes(), lambda *_: None))
    load_packed(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"{}",
        b"PK\x03\x04" * 9,
        b"\x00" * 64,
        b"\xff" * 64,
        b"\x02" + b"\0" * 7 + b"{}",
    ],
)
def test_foreign_file_is_an_error(content, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a packed file|cannot open"):
        load_packed(path)
    with pytest.raises(UserError, match="cannot open"):
        load_packed(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="cannot open"):
        load_packed(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot open .*pipe .not a regular file"):
        load_packed(tmp_path / "pipe")


def test_deeply_nested_json_does_not_crash(tmp_path):
    head = b"[" * 200_000
    (tmp_path / "m.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(UserError, match="not a packed file"):
        load_packed(tmp_path / "m.safetensors")


@pytest.mark.parametrize("trials", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_every_flipped_or_missing_bit_is_detected(tmp_path, trials):
    """Bit flips, cuts and appended bytes of a small file all raise a UserError."""
    draw = np.random.default_rng(0)
    tensors = {
        "float/a": draw.normal(size=(3, 4)).astype(np.float32),
        "int/b": np.arange(5),
        "scale": np.ones(2, np.float32),
        "plane0": draw.integers(0, 256, 40, dtype=np.uint8),
    }
    path = tmp_path / "m.safetensors"
    write_container(path, tensors, {"layers": []})
    raw = path.read_bytes()

    def everything():
        with Container(path) as file:
            return {
                name: array.copy()
                for section in file.sections
                for name, array in file.read(section).items()
            }

    for name, array in everything().items():
        np.testing.assert_array_equal(array, tensors[name])
    for trial in range(trials):
        bad = bytearray(raw)
        if trial % 3 == 0:
            at = int(draw.integers(0, len(raw)))
            bad[at] ^= 1 << int(draw.integers(0, 8))
        elif trial % 3 == 1:
            del bad[int(draw.integers(0, len(raw))) :]
        else:
            at, size = int(draw.integers(0, len(raw))), int(draw.integers(1, 40))
            bad[at : at + size] = draw.bytes(int(draw.integers(0, 40)))
        if bytes(bad) == raw:
            continue
        path.write_bytes(bad)
        with pytest.raises(UserError):
            everything()


def test_bit_flips_in_a_real_file_never_give_a_model(packed, tmp_path):
    raw, draw = packed.read_bytes(), np.random.default_rng(1)
    path = tmp_path / "m.safetensors"
    for at in draw.integers(0, len(raw), 300):
        bad = bytearray(raw)
        bad[at] ^= 1 << int(draw.integers(0, 8))
        path.write_bytes(bad)
        with pytest.raises(UserError):
            read_all(path)
    with pytest.raises(UserError):
        load_packed(path)


JUNK = [
    None,
    True,
    0,
    -1,
    9,
    1 << 40,
    1.5,
    "",
    "x",
    "../x",
    "norm4",
    [],
    [0],
    ["a"],
    [[]],
    {},
    {"a": 1},
]


def places(thing, path=()):
    """Yield every key and index of a header, of long lists only the first and last."""
    items = (
        thing.items()
        if isinstance(thing, dict)
        else list(enumerate(thing))
        if isinstance(thing, list)
        else []
    )
    for key, inner in [*items][:40] if isinstance(thing, dict) else [*items[:2], *items[-1:]]:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_header_with_random_values_loads_or_is_an_error(packed, tmp_path):
    """With correct checksums, the checks of the reader remain. They raise only UserError."""
    draw, raw, path = np.random.default_rng(2), packed.read_bytes(), tmp_path / "m.safetensors"
    refused = 0
    for trial in range(400):

        def change(metadata, index, content):
            where = content if draw.random() < 0.8 else index
            spots = [p for p in places(where) if p[0] != "checksums"]
            *outer, last = spots[int(draw.integers(len(spots)))]
            for key in outer:
                where = where[key]
            if draw.random() < 0.2:
                del where[last]
            else:
                where[last] = JUNK[int(draw.integers(len(JUNK)))]

        path.write_bytes(resign(raw, change))
        try:
            if trial % 16 == 0:
                load_packed(path, bits=(None, 3)[trial % 32 // 16])
            else:
                read_all(path)
        except UserError:
            refused += 1
    assert refused > 200


def test_compressed_plane_cannot_exceed_the_size_of_a_plane(net, tmp_path):
    import zstandard

    from tq_lightning import save_packed

    path = tmp_path / "m.safetensors"
    save_packed(net[0], path, compress=True)
    header, tensors = read_all(path)
    bomb = np.frombuffer(zstandard.ZstdCompressor().compress(b"\0" * (1 << 28)), np.uint8)
    write_container(path, {**tensors, "plane0": bomb}, {**header, "compression": "zstd-xor0"})
    with pytest.raises(UserError, match="does not decompress"):
        load_packed(path)
    write_container(
        path, {**tensors, "plane0": bomb[: bomb.size // 2]}, {**header, "compression": "zstd-xor0"}
    )
    with pytest.raises(UserError):
        load_packed(path)


def test_model_never_writes_to_its_file(packed):
    model = load_packed(packed)
    with torch.no_grad():
        model.fc.weight.zero_()
    assert load_packed(packed).fc.weight.abs().sum() > 0
