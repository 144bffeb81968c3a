"""TQDataModule: a data set of `DATASETS` as a LightningDataModule.

Its signature is the `data:` section of a configuration.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor

from tq_lightning.data import augment
from tq_lightning.data.batch_reader import BatchReader, ImageDataset, default_workers
from tq_lightning.data.datasets import DATASETS
from tq_lightning.data.factory_meta import FactoryMeta
from tq_lightning.data.loaders import EvalLoader, TrainLoader, make_train_loader, process_index
from tq_lightning.data.sampling import CALIBRATION_SEED, calibration_samples, run_seed
from tq_lightning.data.splits import Source, Splits
from tq_lightning.data.validation import (
    check_data_options,
    check_unused,
    check_val_fraction,
    unused_keys,
)
from tq_lightning.files import expand_path


class TQDataModule(lightning.LightningDataModule, metaclass=FactoryMeta):
    """Training, validation and test batches of one data set.

    A batch is (images, labels): images float32 (B, 3, image_size, image_size), normalized, on the
    device; labels int64 (B,), or float (B, classes) with mixup, cutmix or label smoothing. The
    order of epoch e and the augmentation of its batches depend only on (seed, e, batch). They do
    not change after a resume, and two processes at batch size 64 see the same batches as one at
    128.

    Validation uses the validation split, or samples held out of the training split if there is
    none. Test and predict use the test split, or the validation split if there is none (ImageNet).
    Only `test` and `predict` read the test split.

    Attributes:
        input_shape: (3, image_size, image_size).
        mean: per-channel mean for the normalization of images.
        std: per-channel standard deviation for the normalization of images.
        interpolation: interpolation of evaluation.
        crop_pct: crop of evaluation.

    Args:
        name: digits, cifar10, cifar100, imagenet, imagefolder, wds, synthetic or hfds/PATH; or
            package.module:factory, your own function that returns a LightningDataModule or
            data sets (train, test) or (train, val, test).
        root: folder with <split>/<class>/<image>, or <split>.tar with the same content; split is
            train, val or test. cifar10 and cifar100 also accept torchvision's files, imagefolder
            also accepts a folder or tar of classes without splits. For hfds, the cache folder. Not
            read for digits, synthetic and your own data.
        download: let torchvision download cifar10 or cifar100 into root if it is not found.
        num_classes: number of classes to generate for synthetic (10), or to require of other data
            sets; null accepts any number.
        image_size: height and width in pixels; null is 8 for digits, 32 for cifar and synthetic,
            224 for image files.
        batch_size: training samples per process and step.
        eval_batch_size: samples per process and step in evaluation; null is twice batch_size, and
            at least 256 for small images.
        workers: processes that read image files; null is one per core, up to 8. Not used for
            images in memory.
        val_fraction: fraction of the training split held out for validation if there is no
            validation split, at least one sample; the same samples for every seed.
        samples: number of training samples to use, balanced over the classes; null uses all. For
            synthetic, the number to generate (2048).
        mean: per-channel mean of the images in 0..1; null is the default of the data set.
        std: per-channel standard deviation of the images in 0..1; null is the default of the data
            set.
        interpolation: resizing in evaluation and `classify`, bilinear or bicubic.
        train_interpolation: resizing of image files in training, random, bilinear or bicubic.
        crop_pct: in evaluation, image files are resized so that the crop covers this fraction of
            their shorter side.
        pad: black border in pixels of the random crop of small images; null is the default of the
            data set, 4 for cifar.
        hflip: probability of mirroring a training image; null is the default of the data set, 0.5
            except for digits.
        scale: smallest fraction of the area of an image file that a random crop covers. This key,
            train_interpolation and crop_pct are for image files only, pad for other images only.
        color_jitter: timm's color jitter; null is the default of the data set, 0.4 for image files.
            Not with auto_augment, except for its policies 3a, as in timm.
        auto_augment: timm's policy, e.g. rand-m9-mstd0.5-inc1; null for none.
        reprob: probability of timm's random erasing.
        remode: fill of random erasing, const, rand or pixel.
        mixup: timm's mixup alpha, 0 for none.
        cutmix: timm's cutmix alpha, 0 for none.
        smoothing: label smoothing.
        seed: seed of the order and the augmentation; null takes seed_everything.
        data_args: arguments of your own data set, data.name=package.module:factory.
    """

    def __init__(
        self,
        name: str = "digits",
        root: str = "data",
        download: bool = True,
        num_classes: int | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        workers: int | None = None,
        val_fraction: float = 0.1,
        samples: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str = "bicubic",
        train_interpolation: str = "random",
        crop_pct: float = 0.875,
        pad: int | None = None,
        hflip: float | None = None,
        scale: float = 0.08,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        reprob: float = 0.0,
        remode: str = "pixel",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        seed: int | None = None,
        data_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        given = locals()
        check_data_options(given)
        kind, _, path = name.partition("/")
        path = path and str(expand_path(path))
        row = self._row = DATASETS[kind]
        check_unused(given, inspect.signature(TQDataModule), unused_keys(kind))
        self.name, self.batch_size = name, batch_size
        self.image_size = image_size or row["size"] or 224
        self.input_shape = (3, self.image_size, self.image_size)
        self.eval_batch_size = eval_batch_size or max(2 * batch_size, 256 if row["size"] else 1)
        self.workers = default_workers() if workers is None else workers
        self.mean, self.std = tuple(mean or row["mean"]), tuple(std or row["std"])
        self.interpolation, self.train_interpolation = interpolation, train_interpolation
        self.crop_pct = 1.0 if row["size"] else crop_pct
        self.pad = row["pad"] if pad is None else pad
        self.hflip = row["hflip"] if hflip is None else hflip
        self.scale, self.auto_augment = scale, auto_augment
        self.color_jitter = row["jitter"] if color_jitter is None else color_jitter
        self.reprob, self.remode = reprob, remode
        self.mix = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": smoothing}
        self.seed = run_seed() if seed is None else seed
        self._expected = num_classes
        source = Source(expand_path(root), download, num_classes, self.image_size, samples, path)
        self.splits = Splits(name, row["read"], source, val_fraction, samples)
        self._readers: dict[tuple[str, str], BatchReader] = {}
        self._augment: augment.BatchAugment | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes: fixed by the data set, configured, or read from its files."""
        known = self._row["classes"] or self._expected
        return known or (10 if self.name == "synthetic" else len(self.class_names))

    @property
    def class_names(self) -> list[str]:
        """Class names by index, from the first existing split."""
        return self.splits.class_names()

    @property
    def mixup(self) -> Any:
        """Mixup of timm, which also applies label smoothing; None if neither is configured."""
        if not any(self.mix.values()):
            return None
        from timm.data.mixup import Mixup

        prob = 1.0 if self.mix["mixup_alpha"] or self.mix["cutmix_alpha"] else 0.0
        return Mixup(prob=prob, num_classes=self.num_classes, **self.mix)

    def calibration_batches(
        self, n: int, batch_size: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield augmented training batches to estimate norm statistics from.

        The batches do not depend on the seed, epoch, process and random state, and do not change
        any of them.

        Args:
            n: number of batches; fewer are returned if the training split is smaller.
            batch_size: samples per batch; None is the batch size of training.
            device: device of the batches.

        Yields:
            (images, labels).
        """
        size = batch_size or self.batch_size
        split, samples = self.splits.for_stage("train")
        samples = calibration_samples(samples, n * size)
        augmentation = self._new_augment(CALIBRATION_SEED)
        if augmentation.mixup is not None:  # it pairs the images of a batch
            samples = samples[: samples.numel() // 2 * 2]
        # a separate reader, because validation may be reading the same split
        reader = self._new_reader(split, training=True)
        batches = reader(lambda: iter(samples.split(size)), CALIBRATION_SEED)
        for number, (pixels, labels) in enumerate(batches):
            draw = augmentation.draw(0, number, len(labels), torch.arange(len(labels)))
            draw = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in draw.items()}
            yield self._augmented(augmentation, pixels.to(device), labels.to(device), draw)

    def split_of(self, stage: str) -> str:
        """Return the name of the split that the stage train, val or test reads."""
        return self.splits.for_stage(stage)[0]

    def _reader(self, name: str, stage: str) -> BatchReader:
        """Return the reader of a split for a stage, cached so that its workers persist."""
        if (name, stage) not in self._readers:
            self._readers[name, stage] = self._new_reader(name, training=stage == "train")
        return self._readers[name, stage]

    def _new_reader(self, name: str, training: bool) -> BatchReader:
        split = self.splits[name]
        read, transform = split.read, None
        color = {
            "color_jitter": self.color_jitter or None,
            "auto_augment": self.auto_augment,
            "mean": self.mean,
        }
        if read is not None and training:
            transform = augment.train_transform(
                self.image_size, self.scale, self.hflip, self.train_interpolation, **color
            )
        elif read is not None:
            transform = augment.eval_transform(self.image_size, self.crop_pct, self.interpolation)
        elif training and (self.color_jitter or self.auto_augment):
            read, transform = split.picture, augment.ColorTransform(self.image_size, **color)
        items = None
        if read is not None and transform is not None:
            items = ImageDataset(read, split.labels.numel(), transform, replace=training)
        return BatchReader(split.labels, split.pixels, items, self.workers)

    def prepare_data(self) -> None:
        """Download a missing data set on one process, before the others look for it."""
        if self.name in ("cifar10", "cifar100"):
            verb = self.trainer.state.fn if self.trainer else None
            self.setup(str(verb.value) if verb else "fit")

    def setup(self, stage: str) -> None:
        """Read the splits of a stage, so that a missing split is an error before training.

        Args:
            stage: fit, validate, test or predict.
        """
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            self.splits.for_stage(part)
        if stage == "fit" and self.splits.find("val") is not None:
            signature = inspect.signature(TQDataModule)
            check_val_fraction(self.name, self.splits.val_fraction, signature)

    def train_dataloader(self) -> TrainLoader:
        """Create the loader of the training samples."""
        name, samples = self.splits.for_stage("train")
        self._augment = self._new_augment(self.seed)
        return make_train_loader(self, self._reader(name, "train"), samples, self._augment)

    def _new_augment(self, seed: int) -> augment.BatchAugment:
        files = self._row["size"] is None  # image files are cropped and mirrored one by one
        pad, hflip = (0, 0.0) if files else (self.pad, self.hflip)
        return augment.BatchAugment(seed, pad, hflip, self.reprob, self.remode, self.mixup)

    def val_dataloader(self) -> EvalLoader:
        """Create the loader of the validation samples."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """Create the loader of the test samples."""
        return self._eval_loader("test")

    predict_dataloader = test_dataloader

    def _eval_loader(self, stage: str) -> EvalLoader:
        name, samples = self.splits.for_stage(stage)
        place = process_index(self.trainer)
        return EvalLoader(self._reader(name, stage), samples, self.eval_batch_size, *place)

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        self._readers.clear()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Augment and normalize a batch of a loader.

        Args:
            batch: (pixels, labels), with the random numbers of a training batch as third item.
            dataloader_idx: not used.

        Returns:
            (images, labels) for the model.
        """
        pixels, labels, *draw = batch
        if not draw or self._augment is None:
            return self.normalize(pixels), labels
        return self._augmented(self._augment, pixels, labels, draw[0])

    def _augmented(
        self, augmentation: augment.BatchAugment, pixels: Tensor, labels: Tensor, draw: Any
    ) -> tuple[Tensor, Tensor]:
        pixels = augmentation.geometry(pixels, draw)
        return augmentation.finish(self.normalize(pixels), labels, draw)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Compute (pixels / 255 - mean) / std and scale to the image size.

        Args:
            pixels: uint8 (B, 3, H, W).

        Returns:
            float32 (B, 3, image_size, image_size).
        """
        mean, std = (
            torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (self.mean, self.std)
        )
        out = pixels.float().div_(255).sub_(mean).div_(std)
        if out.shape[-1] == self.image_size:
            return out
        return torch.nn.functional.interpolate(
            out, self.input_shape[1:], mode=self.interpolation, antialias=True
        )
