"""Embedding tables: quantized on request, always reported, and stored like other weights."""

import pytest
import torch
from torch import nn

from tq_lightning import bit_width, load_packed, prepare, save_packed


class Tokens(nn.Module):
    """Embedding tables, one tied to the classifier."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(13, 8, padding_idx=0), nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("normalizer", ["tanh", "absmax_channel", "learned_channel"])
def test_embedding_tables_are_quantized_on_request(normalizer, tmp_path):
    learned = {"level": "centre", "scale": "span"} if "learned" in normalizer else {}
    options = {"normalizer": normalizer, "norm": "shared", "verbose": False, **learned}
    torch.manual_seed(0)
    model, kept = Tokens(), Tokens()
    kept.load_state_dict(model.state_dict())
    report = prepare(kept, **options)
    assert report["words"] == "embedding (13, 8): float"
    assert "embedding tables: " in str(report) and 0 < report.embedding_share < 1
    assert "up" in report and "float (skip 'first')" in report["up"]
    report = prepare(model, quantize_embeddings=True, skip=["first", "places"], **options)
    assert report["words"].startswith("weight (13, 8): floor")
    assert "float (skip 'first')" in report["up"] and "float (skip 'places')" in report["places"]
    ids = torch.randint(0, 13, (3, 5))
    with bit_width(model, 2, "truncate"), torch.no_grad():
        table = model.words.weight
        assert len(table.unique()) <= (4 * 13 if "channel" in normalizer else 4)
        torch.testing.assert_close(model.words(ids), table[ids])
        assert torch.equal(model.head.weight, table)
    save_packed(model, tmp_path / "m.safetensors")
    packed = load_packed(tmp_path / "m.safetensors", model=Tokens())
    for bits in (8, 3, 1):
        with bit_width(model, bits, "truncate"), bit_width(packed, bits):
            assert torch.equal(model(ids), packed(ids))
    assert packed.tq_file["prepare"]["quantize_embeddings"] is True
    assert "quantize_embeddings" not in kept.tq  # a file without quantized tables stays version 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_norm": 1.0}, "max_norm rescales"), ({"sparse": True}, "its gradients are sparse")],
)
def test_unsupported_embedding_tables(options, reason):
    model = nn.Sequential(nn.Embedding(5, 4, **options), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=reason):
        prepare(model, quantize_embeddings=True, verbose=False)
    prepare(model, verbose=False, skip=[])
