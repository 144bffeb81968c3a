import random

import numpy as np
import pytest
import torch
from PIL import Image

from tq_lightning.data.augment import (
    BatchAugment,
    ColorTransform,
    crop_flip,
    posterize,
    seeded,
    train_transform,
)
from tq_lightning.data.sampling import share


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_seeded_block_is_reproducible_and_restores_the_global_state():
    before = states()
    draws = []
    for _ in range(2):
        with seeded(2**40 + 1):
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert states() == before
    with pytest.raises(RuntimeError), seeded(1):
        raise RuntimeError
    assert states() == before


def test_crop_and_flip_equal_slicing():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    out = crop_flip(
        images, torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([False, True]), pad=1
    )
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    assert torch.equal(out[0], padded[0, :, 0:4, 1:6])
    assert torch.equal(out[1], padded[1, :, 2:6, 2:7].flip(2))
    centre = torch.ones(2, dtype=torch.int64)
    assert torch.equal(
        crop_flip(images, centre, centre, torch.zeros(2, dtype=torch.bool), 1), images
    )


def augment(**changes):
    from timm.data.mixup import Mixup

    mix = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    return BatchAugment(
        **{"seed": 1, "pad": 2, "hflip": 0.5, "reprob": 0.5, "remode": "pixel", "mixup": mix}
        | changes
    )


def run(augment, images, labels, epoch, batch, rank=0, world=1):
    mine = share(len(labels), rank, world)
    draw = augment.draw(epoch, batch, len(labels), mine)
    return augment.finish(augment.geometry(images[mine], draw), labels[mine], draw)


def test_batch_depends_only_on_seed_epoch_and_number():
    images, labels = torch.rand(8, 3, 12, 12), torch.arange(8)
    torch.manual_seed(0)
    one = run(augment(), images, labels, 2, 3)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = states()
    two = run(augment(), images, labels, 2, 3)
    assert states() == before
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], images)
    assert one[1].shape == (8, 10)
    for other in (
        run(augment(), images, labels, 2, 4),
        run(augment(), images, labels, 1, 3),
        run(augment(seed=2), images, labels, 2, 3),
    ):
        assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_split_the_batch_of_a_single_process(world):
    images, labels = torch.rand(16, 3, 12, 12), torch.arange(16) % 10
    whole, targets = run(augment(), images, labels, 0, 0)
    for rank in range(world):
        part, soft = run(augment(), images, labels, 0, 0, rank, world)
        mine = share(16, rank, world)
        assert torch.equal(part, whole[mine])
        assert torch.equal(soft, targets[mine])


def test_no_augmentation_leaves_images_unchanged():
    plain = augment(pad=0, hflip=0.0, reprob=0.0, mixup=None)
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    out, same = run(plain, images, labels, 0, 0)
    assert plain.draw(0, 0, 4, torch.arange(4)) == {}
    assert torch.equal(out, images)
    assert torch.equal(same, labels)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "augmix-m10-w3", "original-mstd0.5", "v0"])
def test_strongest_posterize_is_black_with_every_version_of_pillow(policy):
    """The policies of timm keep 0 bits at their strongest level, which Pillow 13 refuses."""
    color = {"color_jitter": None, "auto_augment": policy, "mean": (0.5, 0.5, 0.5)}
    made = train_transform(16, 0.08, 0.5, "bicubic", **color)
    small = ColorTransform(16, **color).operations
    operations = []
    for part in [*made.transforms, *small.transforms]:
        policies = [getattr(part, "ops", ()), *getattr(part, "policy", ())]
        operations += [one for policy in policies for one in policy]
    assert operations
    found = [one.aug_fn for one in operations if "posterize" in one.aug_fn.__name__]
    assert found and set(found) == {posterize}
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert posterize(image, 2).getpixel((0, 0)) == (192, 64, 0)
    assert posterize(image, 8) is image
