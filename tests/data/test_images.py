"""Pixel types, and which files of a folder or tar are images of a class."""

import io
import os
import shutil
import struct
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.data.images import SUFFIXES, UnreadableImage, list_images, read_image
from tq_lightning.errors import UserError

GRAY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
CLASSES = ("ant", "bee", "cow")


def sixteen_bit_image(order="="):
    return (GRAY.astype(np.uint16) * 257).astype(f"{order}u2")


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


def pgm():
    return io.BytesIO(b"P5 16 16 65535\n" + sixteen_bit_image(">").tobytes())


def tiff(values, bits, photometric=1):
    """Return the bytes of a TIFF file with gray values of 12 or 16 bits."""
    height, width = values.shape
    if bits == 12:  # two values in three bytes
        one, two = values[:, ::2], values[:, 1::2]
        parts = (one >> 4, (one & 15) << 4 | two >> 8, two & 255)
        data = np.stack(parts, 2).astype(np.uint8).tobytes()
    else:
        data = values.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric}
    tags |= {273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height, 279: len(data)}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return io.BytesIO(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + rows + bytes(4) + data)


GRAYS = {
    "L": lambda: encoded(Image.fromarray(GRAY), "PNG"),
    "I;16 PNG": lambda: encoded(Image.fromarray(sixteen_bit_image()), "PNG"),
    "I;16 TIFF": lambda: encoded(Image.fromarray(sixteen_bit_image()), "TIFF"),
    "I;16B TIFF": lambda: encoded(Image.fromarray(sixteen_bit_image(">")), "TIFF"),
    "I;16 TIFF with white as 0": lambda: tiff(65535 - sixteen_bit_image(), 16, photometric=0),
    "12-bit TIFF": lambda: tiff(np.rint(GRAY * (4095 / 255)).astype(np.uint16), 12),
    "16-bit PGM": pgm,
    "TGA": lambda: encoded(Image.fromarray(GRAY), "TGA"),
    "JPEG 2000": lambda: encoded(Image.fromarray(GRAY), "JPEG2000"),
    "LA": lambda: encoded(Image.merge("LA", [Image.fromarray(GRAY)] * 2), "PNG"),
    "RGB": lambda: encoded(Image.merge("RGB", [Image.fromarray(GRAY)] * 3), "PNG"),
    "RGBA": lambda: encoded(Image.merge("RGBA", [Image.fromarray(GRAY)] * 4), "PNG"),
    "WebP": lambda: encoded(Image.merge("RGB", [Image.fromarray(GRAY)] * 3), "WEBP", lossless=True),
    "GIF": lambda: encoded(Image.fromarray(GRAY), "GIF"),
    "BMP": lambda: encoded(Image.fromarray(GRAY), "BMP"),
    "CMYK": lambda: encoded(
        Image.merge("CMYK", [Image.fromarray(255 - GRAY)] * 3 + [Image.new("L", (16, 16), 0)]),
        "TIFF",
    ),
}


@pytest.mark.parametrize("make", GRAYS.values(), ids=GRAYS.keys())
def test_every_pixel_type_gives_the_8_bit_picture(make):
    image = read_image(make())
    assert image.mode == "RGB"
    for channel in range(3):
        np.testing.assert_array_equal(np.asarray(image)[..., channel], GRAY)
    np.testing.assert_array_equal(np.asarray(read_image(make(), "L")), GRAY)


def test_palettes_and_transparency_become_rgb():
    bits = Image.fromarray(GRAY > 127)
    np.testing.assert_array_equal(
        np.asarray(read_image(encoded(bits, "PNG")))[..., 0], np.where(GRAY > 127, 255, 0)
    )
    colors = [(200, 10, 30), (0, 255, 7), (5, 6, 250)]
    palette = Image.new("P", (3, 1))
    palette.putpalette([value for color in colors for value in color])
    palette.putdata([0, 1, 2])
    for options in ({}, {"transparency": 1}, {"transparency": b"\x80\x00\xff"}):
        image = read_image(encoded(palette, "PNG", **options))
        assert np.asarray(image)[0].tolist() == list(map(list, colors))


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70000)])
def test_unsupported_pixel_type_is_named(mode, value):
    with pytest.raises(UnreadableImage, match=f"pixel type '{mode}'"):
        read_image(encoded(Image.new(mode, (4, 4), value), "TIFF"))


def test_decompression_bomb_is_an_error(monkeypatch):
    stream = encoded(Image.new("L", (64, 64)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_image(stream)


@pytest.mark.parametrize(("size", "fits"), [((1, 1000), True), ((2001, 2), False)])
def test_a_line_of_pixels_is_one_error(size, fits):
    """Resized by its short side, it would have gigabytes."""
    stream = encoded(Image.new("L", size), "PNG")
    if fits:
        assert read_image(stream).size == size
    else:
        with pytest.raises(UnreadableImage, match="2001 x 2 pixels"):
            read_image(stream)


def pattern(label):
    """Draw stripes along rows, along columns, or none, which differ in 16 and in 8 bits."""
    stripes = np.tile(np.arange(16) // 4 % 2 * 60 + 60, (16, 1)).astype(np.uint8)
    return (stripes, stripes.T, np.full((16, 16), 90, np.uint8))[label]


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                image = Image.fromarray(pattern(label))
                image.save(tmp_path / split / name / f"{n}.png")
    return tmp_path


def data_module(root, **keys):
    keys = {"batch_size": 4, "workers": 0, "image_size": 16, "crop_pct": 1.0} | keys
    return TQDataModule("imagefolder", str(root), **keys)


def validation_images(root, **keys):
    data = data_module(root, **keys)
    data.setup("validate")
    batches = [data.on_after_batch_transfer(batch) for batch in data.val_dataloader()]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_16_bit_images_are_trained_and_evaluated_as_8_bit_ones(folder, packed):
    expected, labels = validation_images(folder)
    for path in folder.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)
    if packed:
        for split in ("train", "val"):
            pack(folder, split)
    images, again = validation_images(folder)
    assert torch.equal(images, expected) and torch.equal(labels, again)


def pack(root, split, remove=True):
    with tarfile.open(root / f"{split}.tar", "w") as tar:
        tar.add(root / split, split)
    if remove:
        shutil.rmtree(root / split)


def add_other_files(root):
    """Add files of notebooks, macOS, NAS systems and users. Return their number."""
    picture = (root / "train" / "ant" / "0.png").read_bytes()
    left = [
        "train/preview.png",
        "train/notes.txt",
        "train/ant/.ipynb_checkpoints/0-checkpoint.png",
        "train/.ipynb_checkpoints/x.png",
        "train/@eaDir/0.png",
        "train/bee/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "train/__MACOSX/ant/0.png",
        "train/ant/.hidden.png",
        "train/ant/Thumbs.db",
        "train/@Recently-Snapshot/ant/0.png",
        "train/~snapshot/0.png",
        "train/Network Trash Folder/0.png",
        "train/@tmp/0.png",
    ]
    for name in left:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)
    for path in [*(root / "train").glob("[abc]*/[0-9].png")]:
        path.with_name(f"._{path.name}").write_bytes(b"8 bytes.")
    return len(left) + 3 * 6


@pytest.mark.parametrize("packed", [False, True])
def test_other_files_are_neither_classes_nor_samples(folder, packed, capsys):
    count = add_other_files(folder)
    if packed:
        pack(folder, "train")
    data = data_module(folder)
    data.setup("fit")
    assert data.class_names == list(CLASSES)
    assert Counter(data.splits["train"].labels.tolist()) == {0: 6, 1: 6, 2: 6}
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"18 images of 3 classes; skipped {count}: " in lines[0]
    for reason in ("18 macOS companion files", "not in a class folder", "not images"):
        assert reason in lines[0]


def test_every_file_type_is_read_in_training_and_in_classify(folder):
    for suffix in SUFFIXES:
        path = folder / "train" / "ant" / f"new{suffix.upper()}"
        kind = "PNG" if suffix in (".pbm", ".pgm", ".pnm") else None
        kind = kind or Image.registered_extensions()[suffix]
        Image.merge("RGB", [Image.fromarray(GRAY)] * 3).save(path, kind)
    data = data_module(folder)
    data.setup("fit")
    assert int((data.splits["train"].labels == 0).sum()) == 6 + len(SUFFIXES)
    found, left_out = list_images(folder / "train" / "ant")
    assert len(found) == 6 + len(SUFFIXES) and not left_out.counts


def test_class_of_webp_files_is_found(folder):
    for path in (folder / "train" / "bee").iterdir():
        Image.open(path).save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    data = data_module(folder)
    data.setup("fit")
    assert data.class_names == list(CLASSES)


def error_message(root, stage="fit", name="imagefolder", **keys):
    with pytest.raises(UserError) as caught:
        TQDataModule(name, str(root), batch_size=4, workers=0, download=False, **keys).setup(stage)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_class_of_unsupported_images_is_an_error(folder, packed, capsys):
    """Otherwise the class would be missing. Other files next to the classes are only counted."""
    (folder / "train" / "labels").mkdir()
    (folder / "train" / "labels" / "0.xml").write_text("<a/>")
    (folder / "train" / "bee" / "0.png").rename(folder / "train" / "bee" / "0.heic")
    if packed:
        pack(folder, "train", remove=False)
    data = data_module(folder)
    data.setup("fit")
    assert data.class_names == list(CLASSES)
    *choice, line = capsys.readouterr().err.strip().splitlines()
    assert choice == ([f"{folder}: using train.tar, not train"] if packed else [])
    assert "1 images in unsupported formats (bee/0.heic), 1 not images" in line.replace(
        "train/", ""
    )
    for path in (folder / "train" / "bee").glob("*.png"):
        path.rename(path.with_suffix(".HEIC"))
    if packed:
        pack(folder, "train")
    assert "1 class folders of images in unsupported formats" in error_message(folder)


def test_class_folder_of_system_files_is_empty(folder):
    for path in (folder / "train" / "bee").iterdir():
        path.unlink()
    (folder / "train" / "bee" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / "bee" / "Thumbs.db").write_bytes(b"x")
    assert "has 1 empty class folders (bee)" in error_message(folder)


@pytest.mark.parametrize("prefix", ["", "shard-0/"])
def test_webdataset_shard_is_not_read_as_an_image_folder(folder, prefix):
    with tarfile.open(folder / "train.tar", "w") as tar:
        for n, path in enumerate(sorted((folder / "train").rglob("*.png"))):
            tar.add(path, f"{prefix}{n:06}.png")
            info = tarfile.TarInfo(f"{prefix}{n:06}.cls")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    assert ("no images" if not prefix else "single class (shard-0)") in error_message(folder)


@pytest.mark.parametrize("kind", ["fifo", "link to a device", "broken link", "link to itself"])
def test_special_files_are_not_opened(folder, kind, capsys):
    path = folder / "train" / "ant" / "special.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    else:
        path.with_suffix("").symlink_to(folder / "train")
    data = data_module(folder)
    data.setup("fit")
    assert data.splits["train"].labels.numel() == 18
    if kind != "link to itself":
        assert "skipped 1: " in capsys.readouterr().err
    list(data.train_dataloader())


def test_split_that_is_a_fifo_is_an_error(folder):
    os.mkfifo(folder / "train.tar")
    assert "neither a folder nor a regular file" in error_message(folder)


@pytest.mark.parametrize("size", [1, 10**6, 2**62])
@pytest.mark.parametrize("which", [0, 5, -1])
def test_wrong_member_size_in_a_tar_loses_no_image_silently(folder, size, which):
    """No image is lost silently, for any size in the header of a member."""
    pack(folder, "train", remove=False)
    raw = bytearray((folder / "train.tar").read_bytes())
    with tarfile.open(folder / "train.tar") as tar:
        member = [m for m in tar if m.isfile()][which]
    header = raw[member.offset : member.offset + 512]
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    raw[member.offset : member.offset + 512] = header
    (folder / "train.tar").write_bytes(raw)
    try:
        data = data_module(folder)
        data.setup("fit")
    except UserError as error:
        assert "train.tar can't be read to its end" in str(error)
    else:  # a size in the same block: all members are found, and one is a damaged image
        assert size == 1 and data.splits["train"].labels.numel() == 18


def test_black_image_after_a_short_size_is_not_the_end_of_the_tar(folder):
    """512 zero bytes inside the data of a member look like the end of the archive."""
    shutil.rmtree(folder / "train")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name in ("ant/0.bmp", "bee/0.bmp"):
            stream = encoded(Image.new("RGB", (32, 32)), "BMP")
            info = tarfile.TarInfo(name)
            info.size = len(stream.getvalue())
            tar.addfile(info, stream)
    raw = bytearray((folder / "train.tar").read_bytes())
    raw[124:136] = tarfile.itn(512, 12, tarfile.GNU_FORMAT)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    (folder / "train.tar").write_bytes(raw)
    assert "data after the end of the archive" in error_message(folder)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_unreadable_training_images_are_replaced_and_counted(folder, workers, monkeypatch, capsys):
    """A truncated file and a decompression bomb among good images."""
    whole = (folder / "train" / "ant" / "1.png").read_bytes()
    (folder / "train" / "ant" / "1.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (400, 400)).save(folder / "train" / "bee" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    data = data_module(folder, workers=workers)
    for _ in range(2):
        batches = list(data.train_dataloader())
        assert sum(len(labels) for _, labels, _ in batches) == 16
    lines = [line for line in capsys.readouterr().err.splitlines() if "unreadable" in line]
    assert "replaced 2 unreadable images of 18 with others; the first is " in lines[-1]
    assert any(name in lines[-1] for name in ("ant/1.png", "bee/1.png"))
    data.teardown("fit")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_unreadable_images_are_skipped_in_evaluation(folder, workers, capsys):
    """A replacement image would be scored twice."""
    data = data_module(folder, workers=workers, eval_batch_size=4)
    whole = [labels for _, labels in data.val_dataloader()]
    data.teardown("fit")
    broken = [path for path in sorted((folder / "val").rglob("*.png")) if path.stem == "0"]
    for path in broken:
        path.write_bytes(b"no picture")
    data = data_module(folder, workers=workers, eval_batch_size=4)
    loader = data.val_dataloader()
    batches = list(loader)
    assert sum(map(len, whole)) == 6 and sum(len(labels) for _, labels in batches) == 3
    assert all(len(images) == len(labels) for images, labels in batches)
    assert loader.scored() == [1, 3, 5]
    printed = capsys.readouterr().err
    assert "skipped 3 unreadable images in the evaluation; the first is ant/0.png" in printed
    data.teardown("fit")


def test_evaluation_without_a_readable_image_is_an_error(folder):
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    data = data_module(folder, eval_batch_size=4)
    with pytest.raises(UserError, match=r"none of 6 images can be read, the first is ant/0"):
        list(data.val_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_data_set_of_unreadable_images_is_an_error(folder, workers):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    data = data_module(folder, workers=workers)
    with pytest.raises(UserError, match=r"18 images in a row can't be read, the first is \w+/"):
        list(data.train_dataloader())
    data.teardown("fit")


def test_file_names_that_are_not_utf8_are_read(folder, capsys):
    odd = os.fsdecode(b"caf\xe9")
    os.rename(folder / "train" / "ant", folder / "train" / odd)
    os.rename(folder / "val" / "ant", folder / "val" / odd)
    (folder / "train" / f"{odd}.png").write_bytes(b"")
    data = data_module(folder)
    data.setup("fit")
    assert odd in data.class_names
    assert "1 not in a class folder (caf\\udce9.png)" in capsys.readouterr().err
    assert sum(len(labels) for _, labels, _ in data.train_dataloader()) == 16


def test_cifar_as_images_compares_the_classes_of_both_splits(tmp_path):
    names = [f"class{n}" for n in range(10)]
    for split in ("train", "test"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    TQDataModule("cifar10", str(tmp_path), download=False).setup("test")
    os.rename(tmp_path / "test" / "class3", tmp_path / "test" / "cat")
    message = error_message(tmp_path, "test", "cifar10")
    assert "different classes (cat and class0)" in message


def test_16_bit_values_keep_their_contrast():
    values = np.tile(np.where(np.arange(8) % 2, 34000, 12000), (8, 1)).astype(np.uint16)
    image = np.asarray(read_image(encoded(Image.fromarray(values), "PNG")))[..., 0]
    assert set(np.unique(image)) == {round(12000 / 257), round(34000 / 257)}


def test_missing_cpu_affinity_is_supported(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert TQDataModule("digits").workers == 3


@pytest.mark.slow
def test_tar_with_one_tar_per_class_is_read(folder):
    """The layout of ImageNet's own training archive."""
    pack(folder, "val")
    with tarfile.open(folder / "train.tar", "w") as outer:
        for name in CLASSES:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in sorted((folder / "train" / name).iterdir()):
                    tar.add(path, path.name)
            info = tarfile.TarInfo(f"{name}.tar")
            info.size = len(inner.getvalue())
            inner.seek(0)
            outer.addfile(info, inner)
    expected = [np.asarray(Image.open(folder / "train" / name / "3.png")) for name in CLASSES]
    shutil.rmtree(folder / "train")
    data = data_module(folder)
    data.setup("fit")
    split = data.splits["train"]
    assert data.class_names == list(CLASSES) and split.labels.numel() == 18
    for label, number in enumerate((3, 9, 15)):
        image, got = split.read(number)
        assert got == label
        np.testing.assert_array_equal(np.asarray(image)[..., 0], expected[label])
