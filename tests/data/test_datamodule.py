"""Contract of every row of DATASETS and of the data module."""

import inspect
import random
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pytest
import torch

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.errors import UserError


def batches(module, loader):
    return [module.on_after_batch_transfer(b, 0) for b in loader]


def test_digits_has_the_documented_splits():
    module = TQDataModule("digits", batch_size=64, eval_batch_size=100)
    module.setup("fit")
    assert (module.num_classes, module.input_shape) == (10, (3, 8, 8))
    train, val = (
        batches(module, module.train_dataloader()),
        batches(module, module.val_dataloader()),
    )
    module.setup("test")
    test = batches(module, module.test_dataloader())
    assert [sum(len(y) for _, y in part) for part in (val, test)] == [144, 360]
    assert len(train) == (1797 - 360 - 144) // 64
    images, labels = train[0]
    assert (images.dtype, labels.dtype, images.shape) == (torch.float32, torch.int64, (64, 3, 8, 8))
    everything = torch.cat([x for x, _ in test])
    assert abs(everything.mean()) < 0.05
    assert abs(everything.std() - 1) < 0.05


def test_splits_do_not_overlap():
    """Held-out digits are not trained on, for any seed, and a fit does not read the test split."""
    module, other = TQDataModule("digits", seed=0), TQDataModule("digits", seed=1)
    (_, train), (_, val) = module.splits.for_stage("train"), module.splits.for_stage("val")
    assert not set(train.tolist()) & set(val.tolist())
    assert torch.equal(val, other.splits.for_stage("val")[1])
    assert "test" not in module.splits.loaded
    few = TQDataModule("digits", samples=50).splits.for_stage("train")[1]
    assert few.numel() == 50
    assert not set(few.tolist()) & set(val.tolist())


@pytest.mark.parametrize(("size", "classes"), [(8, 4), (32, 10), (48, 100)])
def test_synthetic_has_the_requested_size_and_classes(size, classes):
    module = TQDataModule(
        "synthetic", image_size=size, num_classes=classes, samples=300, batch_size=50
    )
    module.setup("fit")
    images, labels = batches(module, module.train_dataloader())[0]
    assert images.shape == (50, 3, size, size)
    assert module.num_classes == len(module.class_names) == classes
    assert labels.max() < classes
    assert sum(len(y) for _, y in module.val_dataloader()) == 75


def test_synthetic_can_be_learned():
    """The nearest class mean of the training images classifies most validation images."""
    module = TQDataModule("synthetic", samples=600, batch_size=600, pad=0, hflip=0.0)
    images, labels = batches(module, module.train_dataloader())[0]
    means = torch.stack([images[labels == c].mean(0) for c in range(10)])
    tried, truth = batches(module, module.val_dataloader())[0]
    guess = torch.cdist(tried.flatten(1), means.flatten(1)).argmin(1)
    assert (guess == truth).float().mean() > 0.9


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_are_normalized_with_the_given_mean_and_std(split):
    module = TQDataModule(
        "digits", pad=0, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 1.0], eval_batch_size=7, batch_size=7
    )
    loader = getattr(module, f"{split}_dataloader")()
    raw = next(iter(loader))
    got, _ = module.on_after_batch_transfer(raw, 0)
    expected = (raw[0].double() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.25, 1.0]
    ).view(3, 1, 1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_targets_are_soft_only_with_mixup_or_smoothing():
    for keys, soft in (
        ({}, False),
        ({"smoothing": 0.1}, True),
        ({"mixup": 0.2}, True),
        ({"cutmix": 1.0}, True),
    ):
        module = TQDataModule("digits", batch_size=16, **keys)
        _, labels = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
        assert (labels.dtype == torch.float32) == soft == (module.mixup is not None)
        if soft:
            torch.testing.assert_close(labels.sum(1), torch.ones(16))
        _, hard = module.on_after_batch_transfer(next(iter(module.val_dataloader())), 0)
        assert hard.dtype == torch.int64
    with pytest.raises(UserError, match="even"):
        TQDataModule("digits", batch_size=15, mixup=0.2).train_dataloader()


def test_loaders_do_not_use_the_global_random_state():
    module = TQDataModule(
        "digits", auto_augment="rand-m9", reprob=0.5, mixup=0.2, batch_size=500, workers=0
    )
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batches(module, module.train_dataloader())
    batches(module, module.val_dataloader())
    list(module.calibration_batches(2))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_calibration_batches_are_deterministic():
    module, other = (
        TQDataModule("digits", seed=0, batch_size=32),
        TQDataModule("digits", seed=9, batch_size=32, eval_batch_size=7),
    )
    first = list(module.calibration_batches(3))
    batches(module, module.train_dataloader())
    for again in (module, other):
        for (x, y), (a, b) in zip(first, again.calibration_batches(3), strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
    _, held = module.splits.for_stage("val")
    assert len(list(module.calibration_batches(10**6, batch_size=1000))) == 2
    assert len(held) == 144


def test_calibration_batches_are_augmented_as_in_training():
    def images(**keys):
        data = TQDataModule("digits", batch_size=31, workers=0, **{"pad": 0, **keys})
        return torch.cat([x for x, _ in data.calibration_batches(2)])

    plain = images()
    assert plain.shape[0] == 62
    for key in ({"pad": 1}, {"hflip": 0.5}, {"reprob": 0.5}, {"auto_augment": "rand-m9"}):
        changed = (images(**key) != plain).flatten(1).any(1)
        assert 10 < changed.sum() <= 62, key
    mixed = list(TQDataModule("digits", batch_size=32, pad=0, mixup=0.5).calibration_batches(10**6))
    assert mixed[0][1].shape == (32, 10)  # soft labels: images are mixed
    assert sum(len(x) for x, _ in mixed) == 1292  # of 1293: the last image has no partner


def test_auto_augment_of_small_images_keeps_labels_and_order():
    plain, fancy = (
        TQDataModule("digits", workers=0, seed=2, auto_augment=a) for a in (None, "rand-m9")
    )
    (x, y), (a, b) = (
        m.on_after_batch_transfer(next(iter(m.train_dataloader())), 0) for m in (plain, fancy)
    )
    assert torch.equal(y, b)
    assert x.shape == a.shape
    assert not torch.equal(x, a)


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_split_the_batches_of_one(rank):
    keys = {"name": "digits", "hflip": 0.5, "reprob": 0.5, "mixup": 0.2, "seed": 4}
    one, two = TQDataModule(batch_size=64, **keys), TQDataModule(batch_size=32, **keys)
    whole = batches(one, one.train_dataloader())
    two.trainer = SimpleNamespace(global_rank=rank, world_size=2, training=False)
    half = batches(two, two.train_dataloader())
    assert len(whole) == len(half)
    mine = slice(0, 16) if rank == 0 else slice(16, 32)
    for (x, y), (a, b) in zip(whole, half, strict=True):
        assert torch.equal(x[mine], a[:16])
        assert torch.equal(y[mine], b[:16])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "mnist"}, "got 'mnist', pass one of digits, cifar10"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"mean": [0.5]}, "data.mean"),
        ({"mean": [123.7, 116.3, 103.5]}, "divide values for 0..255 by 255"),
        ({"mean": [0.5, 0.5, float("nan")]}, "data.mean"),
        ({"std": [58.4, 57.1, 57.4]}, "divide values for 0..255 by 255"),
        ({"std": [0.5, 0.5, 0]}, "data.std"),
        ({"remode": "noise"}, "const, rand, pixel"),
        ({"num_classes": 7}, "data.num_classes=7, but digits"),
        ({"name": "synthetic", "val_fraction": 0.2}, "omit it, since there is a validation split"),
        (
            {"auto_augment": "rand-m9", "color_jitter": 0.4},
            "data.color_jitter=0.4 has no effect beside data.auto_augment=rand-m9; omit one",
        ),
    ],
)
def test_invalid_key_is_an_error_of_one_line(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        TQDataModule(**keys).setup("fit")
    assert "\n" not in str(caught.value)


def test_keys_that_only_say_what_is_so_are_accepted():
    TQDataModule("synthetic", val_fraction=0.0, samples=64).setup("fit")
    TQDataModule("digits", root="elsewhere", val_fraction=0.3).setup("fit")
    TQDataModule("digits", auto_augment="rand-m9", color_jitter=0.0)
    TQDataModule("digits", auto_augment="3a", color_jitter=0.4)  # timm applies both


def test_every_key_has_a_help_text_and_a_default():
    """Every key has a help text and a default, and strings from YAML build the module."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(TQDataModule, "data")
    help_text = parser.format_help()
    for name, parameter in inspect.signature(TQDataModule).parameters.items():
        assert f"--data.{name} " in help_text
        assert parameter.default is not inspect.Parameter.empty
        assert f"\n    {name}: " in inspect.getdoc(TQDataModule), f"{name} has no line under Args"
    assert "probability of timm's random erasing" in help_text
    config = parser.parse_args(
        ["--data.name=synthetic", "--data.mean=[0.1,0.2,0.3]", "--data.samples=null"]
    )
    assert parser.instantiate_classes(config).data.mean == (0.1, 0.2, 0.3)
