"""WebDataset shards and Hugging Face data sets: the same batches as from a folder."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tq_lightning.data import shard_index, webdataset
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.data.images import UnreadableImage
from tq_lightning.errors import UserError


def encode_png(value):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "png")
    return out.getvalue()


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """60 images in 3 shards, labels as .cls and as .json; 12 for a test."""
    for number in range(3):
        members = {}
        for n in range(20 * number, 20 * number + 20):
            members[f"{n:04}.png"] = encode_png(4 * n)
            if n % 2:
                members[f"{n:04}.cls"] = str(n % 3).encode()
            else:
                members[f"{n:04}.json"] = json.dumps({"label": n % 3}).encode()
        write_shard(tmp_path / f"set-train-{number}.tar", members)
    members = {f"{n}.png": encode_png(n) for n in range(12)} | {f"{n}.cls": b"1" for n in range(12)}
    write_shard(tmp_path / "set-validation-0.tar", members)
    return tmp_path


def data_module(root, workers=0, **keys):
    keys = {"batch_size": 8, "image_size": 8, "seed": 1, "root": str(root), **keys}
    return TQDataModule("wds", workers=workers, **keys)


def pixels_and_labels(loader):
    return [images for images, *_ in loader]


def test_shards_are_read_by_index_with_any_number_of_workers(shards):
    data = data_module(shards)
    split = data.splits.find("train")
    assert split.labels.tolist() == [n % 3 for n in range(60)]
    for n in (0, 19, 20, 59):
        image, label = split.read(n)
        assert (image.getpixel((0, 0))[0], label) == (4 * n, n % 3)
    one, two = (pixels_and_labels(data_module(shards, w).train_dataloader()) for w in (0, 2))
    assert len(one) == 7 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    loader = data.train_dataloader()
    loader.progress = lambda: (0, 5)  # as after a resume
    assert all(torch.equal(a, b) for a, b in zip(pixels_and_labels(loader), one[5:], strict=True))
    assert len(data.val_dataloader().batches) and data.num_classes == 3
    assert len(data.splits.for_stage("test")[1]) == 12  # validation shards of the data set


def test_index_is_rebuilt_only_if_a_shard_changes(shards, monkeypatch):
    data_module(shards).splits.find("train")
    (cache, *_) = shards.glob(".tq_lightning-*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "index_shards", None)  # fails if it is called
        assert len(data_module(shards).splits.find("train").labels) == 60
    write_shard(shards / "set-train-0.tar", {"a.png": encode_png(9), "a.cls": b"2"})
    assert data_module(shards).splits.find("train").labels.tolist()[0] == 2
    for content in (b"damaged", b"", cache.read_bytes()[:200]):
        cache.write_bytes(content)
        assert len(data_module(shards).splits.find("train").labels) == 41


def test_class_names_are_one_per_line(shards):
    def names(content):
        (shards / "classes.txt").write_bytes(content)
        data = data_module(shards)
        data.splits.find("train")
        return data.class_names

    assert names(b"a\nb\n") == ["a", "b", "2"]
    assert names(b"a\r\nb\r\nc\r\nd\n\n") == ["a", "b", "c", "d"]
    for content, message in (
        (b"a\nb\nb\n", "the classes 1 and 2 have the same name, 'b'; pass different names"),
        (b"a\n\nb\nc\n", "line 2 is empty; pass the name of class 1"),
        ("é\nb\nc".encode("latin-1"), "save it as UTF-8"),
    ):
        with pytest.raises(UserError, match=rf"classes.txt.*{message}"):
            names(content)


def test_shard_that_lies_about_sizes_is_an_error_of_one_line(shards):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 44
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    (shards / "set-train-0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"shard .*set-train-0.tar can't be read to its end"):
        data_module(shards).splits.find("train")


def test_labels_are_non_negative_integers():
    for content, extension, label in (
        (b"3\n", "cls", 3),
        (b"007", "cls", 7),
        (b'{"label": 2}', "json", 2),
        (b'{"cls": "2"}', "json", 2),
        (b'{"label": 2.0}', "json", 2),
        (b"-1", "cls", None),
        (b"cat", "cls", None),
        (b"1_0", "cls", None),
        (b'{"label": "1_0"}', "json", None),
        (b'{"label": true}', "json", None),
        (b'{"label": 2.5}', "json", None),
        (b'{"label": [1]}', "json", None),
        (b'{"other": 1}', "json", None),
        (b"3", "json", None),
        (b'"label"', "json", None),
        (b"\xff", "json", None),
        (b'{"label": 1e999}', "json", None),
        (b"9" * 30, "cls", None),
    ):
        assert shard_index._label(content, extension) == label, content


def test_damaged_members_are_reported(shards, capsys):
    members = {"x.png": encode_png(1), "y.png": encode_png(2), "y.cls": b"cat", "z.cls": b"1"}
    write_shard(shards / "set-train-3.tar", members | {"w.png": b"no image", "w.cls": b"0"})
    data = data_module(shards)
    pixels_and_labels(data.train_dataloader())
    printed = capsys.readouterr().err
    assert "61 images in 4 shards" in printed and "set-train-3.tar/x.png" in printed
    assert "1 labels without an image" in printed or "labels without an image" in printed
    loader = data_module(shards, samples=None, val_fraction=0.0, batch_size=1).train_dataloader()
    pixels_and_labels(loader)
    assert "replaced 1 unreadable images of 61" in (err := capsys.readouterr().err)
    assert "w.png in set-train-3.tar" in err
    with open(shards / "set-train-1.tar", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match=r"shard .*set-train-1.tar can't be read to its end"):
        data_module(shards).splits.find("train")


def test_missing_data_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no .tar shards in"):
        data_module(tmp_path).splits.find("train")
    with pytest.raises(UserError, match="no data at"):
        data_module(tmp_path / "nowhere").splits.find("train")
    write_shard(tmp_path / "a.tar", {"x.png": encode_png(1)})
    with pytest.raises(UserError, match=r"no image in .* has a label .*KEY.cls"):
        data_module(tmp_path).splits.find("train")
    with pytest.raises(UserError, match=r"pass one of .*hfds/PATH"):
        TQDataModule("hfds/")


@pytest.mark.slow
def test_hugging_face_data_set_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="an optional extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"])
    )
    rows = {"image": [{"bytes": encode_png(n), "path": None} for n in range(40)]}
    rows["label"] = [n % 2 for n in range(40)]
    (tmp_path / "own").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(tmp_path / "own" / f"{split}.parquet")
        )
    keys = {"root": str(tmp_path / "cache"), "image_size": 8, "batch_size": 8, "seed": 2}
    names = (f"hfds/{tmp_path / 'own'}", "hfds/~/own")
    one, two = (TQDataModule(n, workers=w, **keys) for n, w in zip(names, (0, 2), strict=True))
    assert one.class_names == ["even", "odd"] and len(one.splits.for_stage("val")[1]) == 40
    pairs = zip(
        pixels_and_labels(one.train_dataloader()),
        pixels_and_labels(two.train_dataloader()),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UserError, match=r"hfds/.*nowhere can't be opened"):
        TQDataModule(f"hfds/{tmp_path / 'nowhere'}", **keys).splits.find("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "img"}, r"own: no column image among img, label; pass a data set with the col"),
        ({"label": "labels"}, r"own: no column label among image, labels; pass a data set with"),
        ([[0], [1, 0], [1], [0]], r"the column label has 4 rows of type object; pass a data set"),
        (
            [[0], [1], [1], [0]],
            r"the column label has 4 rows of type int64 lists; pass a data set with",
        ),
        ([0, 1, 2, 5], r"the val split of hfds/.*own has the class index 5, but there are 3 class"),
        ("mixed", r"own can't be opened \(ValueError: Couldn't infer the same data file format"),
    ],
)
def test_hugging_face_data_set_of_another_form_is_one_line(tmp_path, monkeypatch, change, message):
    datasets = pytest.importorskip("datasets", reason="an optional extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = {"image": [encode_png(n) for n in range(4)], "label": [0, 1, 2, 1]}
    names = change if isinstance(change, dict) else {}
    rows = {names.get(key, key): values for key, values in rows.items()}
    (tmp_path / "own").mkdir()
    for split in ("train", "validation"):
        if isinstance(change, list) and (split == "validation" or isinstance(change[0], list)):
            rows["label"] = change
        made = datasets.Dataset.from_dict(rows)
        image = names.get("image", "image")
        made.cast_column(image, datasets.Image()).to_parquet(
            str(tmp_path / "own" / f"{split}.parquet")
        )
    if change == "mixed":
        (tmp_path / "own" / "train.parquet").rename(tmp_path / "own" / "train.csv")
    data = TQDataModule(f"hfds/{tmp_path / 'own'}", root=str(tmp_path / "cache"), workers=0)
    with pytest.raises(UserError, match=message):
        data.setup("fit")


def test_hugging_face_row_without_an_image_is_skipped(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="an optional extra")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = {"image": [encode_png(0), None, encode_png(2)], "label": [0, 1, 2]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "own").mkdir()
    made.to_parquet(str(tmp_path / "own" / "train.parquet"))
    rows = {"image": rows["image"][:1], "label": [1]}  # has fewer classes
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.to_parquet(str(tmp_path / "own" / "validation.parquet"))
    keys = {"root": str(tmp_path / "cache"), "num_classes": 3, "workers": 0}
    data = TQDataModule(f"hfds/{tmp_path / 'own'}", **keys)
    with pytest.raises(UnreadableImage, match=r"image 1 of hfds/.* is missing"):
        data.splits.find("train").read(1)
    assert data.splits.find("val").classes == ["0", "1", "2"]


def test_missing_package_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("tq_lightning.data.hfds.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tq_lightning\[hfds\]'"):
        TQDataModule("hfds/somebody/images", root=str(Path())).splits.find("train")


def test_shard_named_after_two_splits_is_an_error(shards):
    (shards / "._set-train-0.tar").write_bytes(b"a companion of macOS is not a shard")
    assert len(webdataset.find_shards(shards, "train")) == 3
    (shards / "set-train-0.tar").rename(shards / "test-train-0.tar")
    with pytest.raises(UserError, match=r"test-train-0\.tar: .* the splits train and test; move"):
        webdataset.find_shards(shards, "train")


def test_split_in_two_places_is_an_error(shards):
    assert len(webdataset.find_shards(shards, "train")) == 3
    write_shard(shards / "train" / "0.tar", {"0.png": encode_png(0), "0.cls": b"0"})
    message = r"train shards in several places \(train/, set-train-0\.tar\); move all but one"
    with pytest.raises(UserError, match=message):
        webdataset.find_shards(shards, "train")
    for shard in shards.glob("set-train-*.tar"):
        shard.unlink()
    assert webdataset.find_shards(shards, "train") == [shards / "train" / "0.tar"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "broken link"])
def test_shard_that_is_not_a_regular_file_is_an_error(shards, kind):
    path = shards / "set-train-9.tar"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"set-train-9\.tar is not a regular file; move it"):
        data_module(shards).setup("fit")


def test_last_member_of_a_key_counts(tmp_path, capsys):
    members = [("1.png", encode_png(1)), ("1.json", b'{"label": 0}'), ("2.png", encode_png(2))]
    members += [("2.cls", b"1"), ("1.png", encode_png(9)), ("1.json", b'{"label": 2}')]
    members += [("2.json", b'{"label": 2}'), ("2.seg.png", encode_png(3))]
    write_shard(tmp_path / "0.tar", members)
    split = data_module(tmp_path).splits.find("train")
    read = [split.read(n) for n in range(2)]
    assert [(image.getpixel((0, 0))[0], label) for image, label in read] == [(9, 2), (2, 1)]
    line = "2 images in 1 shards; skipped 2: 1 replaced by a later image of the same key (0.tar/1."
    error = capsys.readouterr().err
    assert line in error and "1 with several extensions (0.tar/2.seg.png)" in error


def test_later_label_that_cant_be_read_is_not_replaced_by_an_earlier_one(tmp_path, capsys):
    members = [("1.png", encode_png(1)), ("1.cls", b"0"), ("1.png", encode_png(2)), ("1.cls", b"x")]
    write_shard(tmp_path / "0.tar", [*members, ("2.png", encode_png(2)), ("2.cls", b"1")])
    assert data_module(tmp_path).splits.find("train").labels.tolist() == [1]
    assert "1 with a label that can't be read (0.tar/1.png)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["damaged header", "concatenated", "cut in a header"])
def test_members_after_the_end_of_a_shard_are_an_error(shards, kind):
    path = shards / "set-train-0.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[10].offset
    if kind == "damaged header":
        content[offset + 100] ^= 0xFF
    path.write_bytes(content * 2 if kind == "concatenated" else content)
    if kind == "cut in a header":
        os.truncate(path, offset + 100)
    with pytest.raises(UserError, match=r"set-train-0\.tar can't be read to its end .*; copy it"):
        data_module(shards).setup("fit")


def test_shards_without_labels_are_an_error_of_one_line(tmp_path):
    write_shard(tmp_path / "0.tar", {"a.txt": b"x"})
    with pytest.raises(UserError, match=r"no image in [^(]* has a label; pass shards"):
        data_module(tmp_path).setup("fit")
