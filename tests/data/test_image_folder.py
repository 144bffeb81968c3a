"""Image data sets on disk: every supported layout, and one-line errors for broken ones."""

import io
import itertools
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.data.image_folder import _natural_key
from tq_lightning.errors import UserError

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def make_image(number, size=(32, 32)):
    noise = torch.randint(
        0,
        256,
        (size[1], size[0], 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(number),
    )
    return Image.fromarray(noise.numpy())


def write_images(root, split, classes, each, size=(32, 32), kind="png"):
    for label, name in enumerate(classes):
        for n in range(each):
            path = root / split / name / f"{n:04}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            make_image(1000 * label + n + len(split), size).save(path)


def pack_tar(root, split):
    with tarfile.open(root / f"{split}.tar", "w") as tar:
        tar.add(root / split, split)
    shutil.rmtree(root / split)


@pytest.fixture
def cifar(tmp_path):
    write_images(tmp_path, "train", CIFAR, 6)
    write_images(tmp_path, "test", CIFAR, 2)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, "train", ["ant", "bee", "cow"], 6, (40, 30))
    write_images(tmp_path, "val", ["ant", "bee", "cow"], 2, (40, 30))
    return tmp_path


def data_module(root, name="imagefolder", **keys):
    keys = {"batch_size": 4, "workers": 0, "download": False} | keys
    return TQDataModule(name, str(root), **keys)


def error_message(root, name="imagefolder", stage="fit", **keys):
    with pytest.raises(UserError) as caught:
        data_module(root, name, **keys).setup(stage)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_is_read_from_image_files(cifar, packed):
    if packed:
        pack_tar(cifar, "train")
        pack_tar(cifar, "test")
    data = data_module(cifar, "cifar10")
    data.setup("fit")
    assert data.class_names == CIFAR
    split = data.splits["train"]
    assert split.pixels.shape == (60, 3, 32, 32)
    assert torch.equal(split.pixels[0], torch.tensor(np.asarray(make_image(5))).permute(2, 0, 1))
    assert split.labels.tolist() == sorted(6 * list(range(10)))
    assert "test" not in data.splits.loaded
    data.setup("test")
    assert sum(len(y) for _, y in data.test_dataloader()) == 20


def test_cifar_is_read_from_torchvision_files(tmp_path, monkeypatch):
    """The files have torchvision's format, but other checksums."""
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for number, name in enumerate(
        [
            "data_batch_1",
            "data_batch_2",
            "data_batch_3",
            "data_batch_4",
            "data_batch_5",
            "test_batch",
        ]
    ):
        rows = torch.full((4, 3072), number, dtype=torch.uint8).numpy()
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 3]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR}))
    data = data_module(tmp_path, "cifar10")
    data.setup("fit")
    assert data.splits["train"].pixels.shape == (20, 3, 32, 32)
    assert data.splits["test"].pixels.unique().tolist() == [5]


def test_missing_cifar_is_an_error_without_a_download(tmp_path, monkeypatch):
    import torchvision

    message = error_message(tmp_path, "cifar10")
    for part in (str(tmp_path), "train.tar", "cifar-10-batches-py", "data.download=true"):
        assert part in message
    assert "cifar-100-python" in error_message(tmp_path, "cifar100")

    def no_network(self):
        Path(self.root).mkdir(exist_ok=True)
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    message = error_message(tmp_path / "new", "cifar10", download=True)
    assert "download failed (Name or service not known)" in message
    assert not (tmp_path / "new").exists()  # no empty folder for a mistyped data.root


def test_incomplete_cifar_is_an_error(cifar):
    shutil.rmtree(cifar / "train" / "bird")
    assert "9 classes" in error_message(cifar, "cifar10")
    assert "not among" in error_message(cifar, "imagenet")
    shutil.rmtree(cifar / "test")
    message = error_message(cifar, "cifar10", "test", download=True)
    assert "no test split" in message
    assert "test.tar" in message


def test_unreadable_cifar_image_is_an_error(cifar):
    broken = cifar / "train" / "cat" / "0001.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    assert "cat/0001.png can't be read as an image" in error_message(cifar, "cifar10")
    make_image(0, (16, 32)).save(broken)
    assert "16x32, expected 32x32" in error_message(cifar, "cifar10")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_truncated_tar_is_an_error(cifar, share):
    pack_tar(cifar, "train")
    path = cifar / "train.tar"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content)) // 512 * 512 - 100])
    for name in ("cifar10", "imagefolder"):
        assert "train.tar can't be read to its end" in error_message(cifar, name)


def test_empty_tar_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("train/readme.txt"), io.BytesIO())
    for name in ("cifar10", "imagefolder", "imagenet"):
        assert "no images in" in error_message(tmp_path, name)
    (tmp_path / "train.tar").write_bytes(b"not a tar at all")
    assert "can't be read" in error_message(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_image_folder_is_read_from_folders_and_tar_files(folder, packed, workers):
    if packed:
        pack_tar(folder, "train")
        pack_tar(folder, "val")
    data = data_module(folder, image_size=16, workers=workers)
    assert data.num_classes == 3
    data.setup("fit")
    train = [data.on_after_batch_transfer(b, 0) for b in data.train_dataloader()]
    assert [x.shape for x, _ in train] == [(4, 3, 16, 16)] * 4
    val = [data.on_after_batch_transfer(b, 0) for b in data.val_dataloader()]
    assert torch.cat([y for _, y in val]).tolist() == [0, 0, 1, 1, 2, 2]
    test = [data.on_after_batch_transfer(b, 0) for b in data.test_dataloader()]
    assert torch.equal(test[0][0], val[0][0])  # without a test split, the validation split is used
    if workers:  # the second epoch comes from the same processes
        loader = data.train_dataloader()
        first = list(loader)
        pids = [w.pid for w in loader.fetch._loader._loader._iterator._workers]
        loader.set_epoch(1)
        second = list(loader)
        assert pids == [w.pid for w in loader.fetch._loader._loader._iterator._workers]
        assert not torch.equal(first[0][0], second[0][0])
        data.teardown("fit")


def test_evaluation_transform_equals_timm(folder):
    from timm.data import create_transform

    data = data_module(folder, image_size=16, crop_pct=0.9)
    images, _ = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    timm = create_transform(16, crop_pct=0.9, interpolation="bicubic")
    expected = timm(Image.open(folder / "val" / "ant" / "0000.png"))
    torch.testing.assert_close(images[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_folder_without_splits_is_split(tmp_path, packed):
    write_images(tmp_path, "flat", ["ant", "bee"], 10)
    if packed:
        pack_tar(tmp_path, "flat")
    data = data_module(tmp_path / ("flat.tar" if packed else "flat"), image_size=8)
    data.setup("fit")
    assert [len(data.splits.for_stage(stage)[1]) for stage in ("train", "val")] == [18, 2]
    with pytest.raises(UserError, match="no test split"):
        data.setup("test")


@pytest.mark.parametrize(
    ("classes", "merged"), [(["cat/2023", "dog/2023"], True), (["cat", "dog"], False)]
)
def test_folders_of_one_name_are_reported_as_one_class(tmp_path, capsys, classes, merged):
    write_images(tmp_path, "train", [*classes, "fox/2024"], 2)
    assert len(data_module(tmp_path, image_size=8).class_names) == (2 if merged else 3)
    line = "1 classes have images in several folders, e.g. 2023 in cat/2023 and dog/2023"
    assert (line in capsys.readouterr().err) == merged


def test_imagenet_subset_keeps_the_class_indices(tmp_path):
    write_images(tmp_path, "val", ["n01440764", "n15075141"], 2)
    data = data_module(tmp_path, "imagenet", image_size=8)
    data.setup("validate")
    assert next(iter(data.val_dataloader()))[1].tolist() == [0, 0, 999, 999]
    assert data.num_classes == len(data.class_names) == 1000
    assert "no train split" in error_message(tmp_path, "imagenet")


def test_invalid_folder_is_an_error(folder, tmp_path):
    assert "no data at" in error_message(tmp_path / "nowhere")
    assert "no train split" in error_message(tmp_path / "val" / "ant")
    assert "data.num_classes=5" in error_message(folder, num_classes=5)
    write_images(folder, "val", ["dog"], 1)
    assert "not among the 3 expected classes (dog)" in error_message(folder)
    (folder / "train" / "eel").mkdir()
    assert "empty class folders (eel)" in error_message(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_calibration_during_validation_reads_the_same_split(folder, workers):
    """Held-out images and calibration read the same split at the same time."""
    shutil.rmtree(folder / "val")
    data = data_module(folder, image_size=8, workers=workers, val_fraction=0.4, eval_batch_size=1)
    expected = list(data.val_dataloader())
    calibration = list(data.calibration_batches(2))
    loader = iter(data.val_dataloader())
    got = [next(loader)]
    again = list(data.calibration_batches(2))
    got += list(loader)
    for some, others in ((got, expected), (again, calibration)):
        assert len(some) == len(others) > 1
        assert all(
            torch.equal(x, y)
            for a, b in zip(some, others, strict=True)
            for x, y in zip(a, b, strict=True)
        )


def test_class_order_is_total():
    names = ["a01", "a1", "Cat", "cat", "cat2", "cat10"]
    for order in itertools.permutations(names):
        assert sorted(order, key=_natural_key) == names


@pytest.mark.parametrize("name", ["train", "test"])
def test_class_named_after_a_split_is_an_error_that_says_so(tmp_path, name):
    write_images(tmp_path, ".", [name, "car", "bus"], 3, (40, 30))
    message = error_message(tmp_path)
    assert f"the folder {name} without class folders next to bus, car" in message
    assert f"move the class folders into {tmp_path / 'train'}" in message


def test_split_whose_name_is_capitalized_is_not_a_class(tmp_path):
    """Otherwise the images of Val would be training images too."""
    write_images(tmp_path, "Train", ["ant", "bee"], 3, (40, 30))
    write_images(tmp_path, "Val", ["ant", "bee"], 3, (40, 30))
    message = f"{tmp_path / 'Train'} is not read as a split; rename it to train"
    assert error_message(tmp_path) == message
    flat = tmp_path / "vehicles"
    write_images(flat, ".", ["Train", "Car"], 4, (40, 30))
    data = data_module(flat)
    data.setup("fit")
    assert data.class_names == ["Car", "Train"]


def test_compressed_tar_is_an_error_that_says_so(folder):
    with tarfile.open(folder / "train.tar", "w:gz") as tar:
        tar.add(folder / "train", "train")
    assert error_message(folder) == (
        f"{folder / 'train.tar'} is compressed; unpack it, e.g. to a .tar without gzip"
    )
    assert "train.tar is compressed" in error_message(folder, "wds")


def test_class_of_one_split_only_is_an_error_with_advice_that_helps(folder):
    (folder / "val" / "cow").rename(folder / "val" / "dog")
    message = error_message(folder)
    assert "not among the 3 expected classes (dog): unpack it again; for other classes" in message


def test_other_folders_next_to_the_splits_are_no_classes(folder):
    (folder / "notes").mkdir()
    make_image(0).save(folder / "test.png")
    (folder / "test").mkdir()
    (folder / "test.png").rename(folder / "test" / "0.png")  # images without labels, as in ImageNet
    data = data_module(folder)
    data.setup("fit")
    assert data.class_names == ["ant", "bee", "cow"]


def test_one_line_names_the_split_that_is_used_of_two(folder, capsys):
    """The folder may be newer than the tar that it was unpacked from."""
    shutil.copytree(folder / "train", folder / "copy")
    pack_tar(folder, "train")
    data_module(folder).setup("fit")
    assert "using" not in capsys.readouterr().err
    (folder / "copy").rename(folder / "train")
    data_module(folder).setup("fit")
    assert capsys.readouterr().err.splitlines() == [f"{folder}: using train.tar, not train"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("digits", "crop_pct", 0.5),
        ("synthetic", "scale", 0.5),
        ("cifar10", "train_interpolation", "bicubic"),
        ("imagefolder", "pad", 4),
        ("wds", "pad", 0),
    ],
)
def test_key_without_effect_is_an_error(name, key, value):
    with pytest.raises(UserError) as caught:
        TQDataModule(name, **{key: value})
    assert str(caught.value) == (
        f"data.{key}={value} has no effect on the data of data.name={name}; omit it"
    )


def test_keys_with_an_effect_are_accepted(folder):
    """`classify` resizes its images with `interpolation`; crops of image files have a `scale`."""
    assert TQDataModule("digits", interpolation="bilinear", pad=2).interpolation == "bilinear"
    keys = {"crop_pct": 0.9, "scale": 0.5, "train_interpolation": "bicubic"}
    assert data_module(folder, **keys).crop_pct == 0.9
