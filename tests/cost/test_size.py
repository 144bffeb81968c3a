"""Byte accounting against independent counts: the ratio of the paper, and every scheme."""

import pytest
import timm
import torch
from torch import nn

from tq_lightning import load_packed, save_packed
from tq_lightning.cost.layer_bytes import layer_rows
from tq_lightning.cost.size import (
    WAYS,
    float_over,
    meta_model,
    paper_rows,
    read_at,
    record_bytes,
    total,
)
from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.records import StorageBytes


def build_network():
    """Build a network in which no weight fills whole bytes of a plane."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),  # first: 135 floats
        nn.BatchNorm2d(5),  # 4 x 5 floats a set
        nn.ReLU(),
        nn.Conv2d(5, 7, 1),  # 35 codes, padded to 64: planes of 8 bytes; 7 floats of bias
        nn.LayerNorm(3),  # 6 floats, one set
        nn.Flatten(),
        nn.Linear(63, 2),  # last: 126 + 2 floats
    )


def test_every_storage_scheme_equals_the_manual_count():
    model = build_network()
    prepare(model, verbose=False)
    rows = layer_rows(model)
    floats = 4 * (135 + 7 + 128)
    assert total(rows, "float_master", 8) == StorageBytes(
        total=4 * 35 + floats + 4 * 26,
        weights=4 * 35,
        scales=0,
        float=floats,
        norms=4 * 26,
    )
    assert total(rows, "master8", 8) == StorageBytes(
        total=64 + 4 + floats + 4 * 26,
        weights=64,
        scales=4,
        float=floats,
        norms=4 * 26,
    )
    assert total(rows, "packed", 8).norms == 4 * (8 * 20 + 6)
    assert total(rows, "packed", 8).weights == 64
    each = total(rows, "file_per_width", 8)
    assert each.weights == 8 * 36 and each.float == 8 * floats and each.norms == 8 * 4 * 26
    assert read_at(rows, 3) == 24 + 4 + floats + 4 * 26
    assert read_at(rows, 8) == total(rows, "master8", 8).total


def test_skip_and_norm_policy_change_the_sizes():
    shared, channel, narrow = build_network(), build_network(), build_network()
    prepare(shared, norm="shared", skip=(), verbose=False)
    prepare(channel, normalizer="tanh_channel", verbose=False)
    prepare(narrow, max_bits=4, widths=(4, 2), verbose=False)
    assert total(layer_rows(shared), "packed", 8).norms == 4 * 26
    assert total(layer_rows(shared), "packed", 8).weights == 8 * (24 + 8 + 16)
    assert total(layer_rows(channel), "packed", 8).scales == 4 * 7
    assert total(layer_rows(narrow), "packed", 4).weights == 32
    assert total(layer_rows(narrow), "packed", 4).norms == 4 * (4 * 20 + 6)
    assert {row.bits for row in layer_rows(narrow)} == {None, 4}


def test_resnet50_matches_the_accounting_of_the_paper():
    rows = paper_rows(meta_model("resnet50"))
    paper = total(rows, "paper", 8).total
    # Counted independently: all convolutions except the stem, and the classifier, in 8 bits.
    conv = sum(
        m.weight.numel() for m in meta_model("resnet50").modules() if isinstance(m, nn.Conv2d)
    )
    channels = sum(
        m.num_features for m in meta_model("resnet50").modules() if isinstance(m, nn.BatchNorm2d)
    )
    stem = 64 * 3 * 7 * 7
    by_hand = (conv - stem) + 2048 * 1000 + 4 * stem + 4 * 1000 + 8 * 4 * 4 * channels
    assert paper == by_hand
    assert float_over(rows, paper) == 4 * 25_557_032 / by_hand
    assert round(float_over(rows, paper), 3) == 3.533


def test_float_classifier_lowers_the_ratio():
    """With the classifier in float, as by default, the ratio must fall."""
    model = meta_model("resnet50")
    prepare(model, verbose=False)
    packed = total(layer_rows(model), "packed", 8).total
    assert round(4 * 25_557_032 / packed, 2) == 2.91


@pytest.mark.parametrize("name", ["resnet20_cifar", "test_vit", "test_convnext"])
def test_meta_and_real_models_agree_and_count_every_parameter(name):
    real, meta = create_model(name), meta_model(name)
    parameters = sum(p.numel() for p in real.parameters())
    assert all(p.is_meta for p in meta.parameters())
    prepare(real, verbose=False)
    prepare(meta, verbose=False)
    rows = layer_rows(real)
    assert rows == layer_rows(meta)
    assert sum(row.parameters for row in rows) == parameters


def test_tied_weights_and_attention_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight
            self.attn = nn.MultiheadAttention(6, 2)

    model = Tied()
    parameters = sum(p.numel() for p in model.parameters())
    prepare(model, skip=(), verbose=False)
    rows = {row.name: row for row in layer_rows(model)}
    assert sum(row.parameters for row in rows.values()) == parameters
    assert (rows["a"].codes, rows["b"].codes) == (36, 0)
    assert (
        rows["attn"].codes == 108
        and rows["attn"].kind == "linear"
        and rows["attn.out_proj"].codes == 36
    )


def test_record_has_the_bytes_of_every_width():
    model = create_model("resnet8_cifar")
    parameters = sum(p.numel() for p in model.parameters())
    prepare(model, verbose=False)
    got, rows = record_bytes(model), layer_rows(model)
    assert got.float == 4 * parameters
    assert got.packed == total(rows, "packed", 8).total
    assert list(got.planes) == list(range(1, 9))
    assert sorted(got.planes.values()) == list(got.planes.values())


def test_model_that_needs_values_is_built_with_real_tensors(monkeypatch):
    import tq_lightning.cost.size as storage

    def create(name, num_classes=None, **kwargs):
        model = create_model("resnet8_cifar")
        if next(model.parameters()).is_meta:
            raise UserError("needs values")
        return model

    monkeypatch.setattr(storage, "create_model", create)
    assert not next(storage.meta_model("any").parameters()).is_meta
    with pytest.raises(UserError, match="unknown model"):
        monkeypatch.undo()
        storage.meta_model("resnet5O")


@pytest.mark.parametrize("way", WAYS)
def test_parts_add_up_to_the_total(way):
    model = meta_model("resnet20_cifar")
    prepare(model, verbose=False)
    got = total(layer_rows(model), way, 8)
    parts = [got.weights, got.scales, got.float, got.norms]
    assert got.total == sum(parts) and min(parts) >= 0


@pytest.mark.parametrize(
    "name, policy",
    [
        ("resnet8_cifar", {}),
        ("resnet8_cifar", {"norm": "shared", "skip": (), "normalizer": "absmax_channel"}),
        ("resnet8_cifar", {"activations": "pact_round", "max_bits": 4, "widths": (4, 2)}),
        ("resnet8_cifar", {"normalizer": "float_e2", "level": "native", "scale": "span"}),
        (
            "resnet8_cifar",
            {"normalizer": "gaussian", "level": "centroid", "scale": "span", "max_bits": 4}
            | {"widths": (4, 2)},
        ),
        ("test_vit", {"norm": "per_width_all"}),
        ("test_efficientnet", {}),
        ("test_maxvit", {}),  # index tables and constants beside its parameters
    ],
)
def test_predicted_size_is_the_file_size_without_header(tmp_path, name, policy):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model, unseen = create_model(name), meta_model(name)
    prepare(model, verbose=False, **policy)
    prepare(unseen, verbose=False, **policy)
    max_bits = model.tq["max_bits"]
    for norm in per_width_norms(model):
        norm.calibrated.fill_(True)
    written = save_packed(model, tmp_path / "m.safetensors")
    body = written["total"] - written["header"]
    rows = layer_rows(unseen)
    assert total(rows, "packed", max_bits).total == body
    assert total(rows, "packed", max_bits).weights == sum(
        b for k, b in written.items() if k.startswith("plane")
    )
    assert (tmp_path / "m.safetensors").stat().st_size == body + written["header"]
    for bits in (1, max_bits):
        read = load_packed(tmp_path / "m.safetensors", bits=bits).tq_file["bytes_read"]
        assert read_at(rows, bits) == read - written["header"]


def test_level_tables_are_counted_once():
    rows = {}
    for normalizer, level in (("gaussian", "centroid"), ("absmax", "centre")):
        model = build_network()
        prepare(
            model, normalizer=normalizer, level=level, scale="span", skip=("first",), verbose=False
        )
        rows[level] = layer_rows(model)
    values = 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256
    for way in WAYS:
        more = total(rows["centroid"], way, 8).total - total(rows["centre"], way, 8).total
        assert more == (4 * values if way == "packed" else 0)
    assert read_at(rows["centroid"], 3) - read_at(rows["centre"], 3) == 4 * 8


def test_predicted_size_counts_transposed_and_tied_weights_like_the_file(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(6, 10, 3, groups=2)
            self.a, self.b = nn.Embedding(4, 3), nn.Embedding(4, 3)
            self.b.weight = self.a.weight
            self.register_buffer("table", torch.arange(5), persistent=False)

    model = Odd()
    prepare(model, skip=(), normalizer="tanh_channel", verbose=False)
    written = save_packed(model, tmp_path / "m.safetensors")
    rows = layer_rows(model)
    assert total(rows, "packed", 8).total == written["total"] - written["header"]
    assert total(rows, "float_master", 8).total == 4 * (6 * 5 * 9 + 10 + 12)
