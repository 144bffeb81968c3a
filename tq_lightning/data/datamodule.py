"""TQDataModule: any row of `DATASETS` as a LightningDataModule; its signature is the `data:` section of a configuration."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from tq_lightning.data import augment
from tq_lightning.data import image_folder as images
from tq_lightning.data.datasets import DATASETS, Source, Split
from tq_lightning.data.loaders import BatchReader, EvalLoader, ImageDataset, TrainLoader
from tq_lightning.data.sampling import TrainOrder, generator, stratified
from tq_lightning.data.validation import check
from tq_lightning.errors import UserError


class TQDataModule(lightning.LightningDataModule):
    """Training, validation and test batches of one data set.

    A batch is (images, labels): images float32 (B, 3, image_size, image_size), normalised, on the device; labels int64
    (B,), or float (B, classes) under mixup, cutmix or label smoothing. The order of epoch e and the augmentation of its
    batches depend on (seed, e, batch) alone: the same after a resume, and for two processes at batch 64 as for one at 128.

    Validation is the set's own validation split, or else held out of the training split. Test and predict take the test
    split, or else the validation split of a set that has one (ImageNet has no other). `test` alone touches the test split.

    Attributes:
        input_shape: (3, image_size, image_size).
        mean, std, interpolation, crop_pct: the preprocessing of evaluation.
        num_classes, class_names, mixup: see the properties.

    Args:
        name: digits, cifar10, cifar100, imagenet, imagefolder or synthetic.
        root: folder with <split>/<class>/<image>, or <split>.tar with the same inside; split is train, val or test.
            cifar10 and cifar100 take torchvision's files too, imagefolder also a folder or tar of classes without splits.
        download: let torchvision fetch cifar10 or cifar100 into root where nothing is found.
        num_classes: classes to make for synthetic (10), to insist on for others; null takes what the set has.
        image_size: edge of the images in pixels; null is 8 for digits, 32 for cifar and synthetic, 224 for image files.
        batch_size: training samples per process and step.
        eval_batch_size: samples per process and step in evaluation; null is twice batch_size, at least 256 if small.
        workers: processes that read image files; null is one per core, up to 8. Small images need none.
        val_fraction: share of the training split held out, one sample at least, where the set has no validation split;
            the same samples for every seed.
        samples: train on this many samples, even over the classes; null takes all. For synthetic, how many to make (2048).
        mean: per-channel mean of the images in 0..1; null is the set's own.
        std: per-channel standard deviation of the images in 0..1; null is the set's own.
        interpolation: how images are scaled in evaluation, bilinear or bicubic.
        train_interpolation: how image files are scaled in training, random, bilinear or bicubic.
        crop_pct: in evaluation image files are scaled until the crop takes this share of their shorter side.
        pad: black border in pixels of the random crop of small images; null is the set's own, 4 for cifar.
        hflip: chance to mirror a training image; null is the set's own, 0.5 but for digits.
        scale: smallest share of an image file's area that a random crop takes.
        color_jitter: timm's colour jitter; null is the set's own, 0.4 for image files.
        auto_augment: timm's policy, for example rand-m9-mstd0.5-inc1; null for none.
        reprob: chance of timm's random erasing.
        remode: what random erasing fills in, const, rand or pixel.
        mixup: timm's mixup alpha, 0 for none.
        cutmix: timm's cutmix alpha, 0 for none.
        smoothing: label smoothing.
        seed: of the order and the augmentation; null takes seed_everything.
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
    ) -> None:
        super().__init__()
        check(locals())
        row = self._row = DATASETS[name]
        self.name, self.batch_size, self.val_fraction, self.samples = (
            name,
            batch_size,
            val_fraction,
            samples,
        )
        self.image_size = image_size or row["size"] or 224
        self.input_shape = (3, self.image_size, self.image_size)
        self.eval_batch_size = eval_batch_size or max(2 * batch_size, 256 if row["size"] else 1)
        self.workers = min(8, len(os.sched_getaffinity(0))) if workers is None else workers
        self.mean, self.std = tuple(mean or row["mean"]), tuple(std or row["std"])
        self.interpolation, self.train_interpolation = interpolation, train_interpolation
        self.crop_pct = 1.0 if row["size"] else crop_pct
        self.pad = row["pad"] if pad is None else pad
        self.hflip = row["hflip"] if hflip is None else hflip
        self.scale, self.auto_augment = scale, auto_augment
        self.color_jitter = row["jitter"] if color_jitter is None else color_jitter
        self.reprob, self.remode = reprob, remode
        self.mix = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": smoothing}
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self._expected = num_classes
        self._source = Source(
            Path(root).expanduser(), download, num_classes, self.image_size, samples
        )
        self._splits: dict[str, Split] = {}
        self._absent: set[str] = set()
        self._fetches: dict[tuple[str, str], BatchReader] = {}
        self._augment: augment.BatchAugment | None = None

    # What a model, a calibration and an export header ask for

    @property
    def num_classes(self) -> int:
        """Classes of the set: known from its name, or asked for, or read from its files."""
        return (
            self._row["classes"]
            or self._expected
            or (10 if self.name == "synthetic" else len(self.class_names))
        )

    @property
    def class_names(self) -> list[str]:
        """Names in index order, from the first split there is."""
        split = next(
            (got for name in ("train", "val", "test") if (got := self._split(name)) is not None),
            None,
        )
        if split is None:
            raise UserError(images.missing(self._source.root, "train", "val", "test"))
        return split.classes

    @property
    def mixup(self) -> Any:
        """timm's Mixup as configured, or None; it makes the soft targets of label smoothing too."""
        if not any(self.mix.values()):
            return None
        from timm.data.mixup import Mixup

        prob = 1.0 if self.mix["mixup_alpha"] or self.mix["cutmix_alpha"] else 0.0
        return Mixup(prob=prob, num_classes=self.num_classes, **self.mix)

    def calibration_batches(
        self, n: int, batch_size: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`n` batches (images, labels) of training samples as evaluation sees them, to re-estimate norm statistics.

        Always the same ones, whatever the seed, epoch, process or random state, none of which is touched. Fewer than `n`
        where the training split is smaller.
        """
        size = batch_size or self.batch_size
        split, samples = self._part("train")
        samples = samples[torch.randperm(samples.numel(), generator=generator(8))[: n * size]]
        # a reader of its own: this may be called while validation goes through the same split
        for pixels, labels in self._new_fetch(split, training=False)(
            lambda: iter(samples.split(size))
        ):
            yield self.normalise(pixels.to(device)), labels.to(device)

    # Splits

    def _split(self, name: str) -> Split | None:
        """The split train, val or test, read once; None where the set has none."""
        if name not in self._splits and name not in self._absent:
            got = self._row["read"](self._source, name)
            if (
                got is not None
                and self._expected is not None
                and self._expected != len(got.classes)
            ):
                what = (
                    f"{self.name} at {self._source.root.absolute()} has {len(got.classes)} classes"
                )
                raise UserError(
                    f"data.num_classes={self._expected}, but {what}; pass that number, or null"
                )
            if got is None:
                self._absent.add(name)
            else:
                self._splits[name] = got
        return self._splits.get(name)

    def _need(self, *names: str) -> str:
        """The first of the splits that is there."""
        for name in names:
            if self._split(name) is not None:
                return name
        raise UserError(f"{self.name}: {images.missing(self._source.root, *names)}")

    def _part(self, stage: str) -> tuple[str, Tensor]:
        """(split to read, sample numbers) for stage train, val or test."""
        own = self._split("val") is not None
        name = (
            self._need("test", "val")
            if stage == "test"
            else "val"
            if stage == "val" and own
            else self._need("train")
        )
        labels = self._splits[name].labels
        everything = torch.arange(labels.numel())
        if name != "train":
            return name, everything
        held = torch.zeros(labels.numel(), dtype=torch.bool)
        if not own:
            held[stratified(labels, max(1, round(self.val_fraction * labels.numel())))] = True
            if stage == "val":
                return name, everything[held]
        rest = everything[~held]
        if self.samples is not None and self.samples < rest.numel():
            rest = rest[stratified(labels[rest], self.samples)]
        return name, rest

    def _fetch(self, name: str, stage: str) -> BatchReader:
        """How `stage` reads batches of a split; kept, so that worker processes live on."""
        if (name, stage) not in self._fetches:
            self._fetches[name, stage] = self._new_fetch(name, training=stage == "train")
        return self._fetches[name, stage]

    def _new_fetch(self, name: str, training: bool) -> BatchReader:
        split = self._splits[name]
        read, transform = split.read, None
        colours = {
            "color_jitter": self.color_jitter or None,
            "auto_augment": self.auto_augment,
            "mean": self.mean,
        }
        if read is not None and training:
            how = self.train_interpolation
            transform = augment.train_transform(
                self.image_size, self.scale, self.hflip, how, **colours
            )
        elif read is not None:
            transform = augment.eval_transform(self.image_size, self.crop_pct, self.interpolation)
        elif training and (self.color_jitter or self.auto_augment):
            read, transform = split.picture, augment.colour_transform(self.image_size, **colours)
        items = (
            ImageDataset(read, transform) if read is not None and transform is not None else None
        )
        return BatchReader(split.labels, split.pixels, items, self.workers)

    # Lightning

    def prepare_data(self) -> None:
        """Download where that is needed: on one process, before the others look."""
        if self.name in ("cifar10", "cifar100"):
            self.setup(
                str(self.trainer.state.fn.value)
                if self.trainer and self.trainer.state.fn
                else "fit"
            )

    def setup(self, stage: str) -> None:
        """Read what `stage` (fit, validate, test or predict) needs: a missing set is an error before anything starts."""
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            self._part(part)

    def train_dataloader(self) -> TrainLoader:
        name, samples = self._part("train")
        fetch, mixup = self._fetch(name, "train"), self.mixup
        if mixup is not None and self.batch_size % 2:
            raise UserError(
                f"data.batch_size={self.batch_size} is odd: mixup, cutmix and smoothing need an even one"
            )
        order = TrainOrder(
            samples, self.batch_size, self.seed, *self._place(), even=mixup is not None
        )
        order.shuffle = not getattr(self.trainer, "overfit_batches", 0.0)
        files = self._row["size"] is None  # cropped and mirrored one by one
        pad, hflip = (0, 0.0) if files else (self.pad, self.hflip)
        self._augment = augment.BatchAugment(self.seed, pad, hflip, self.reprob, self.remode, mixup)
        loader = TrainLoader(fetch, order, self._augment)
        loader.progress = lambda: self._progress(loader)
        return loader

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def _eval_loader(self, stage: str) -> EvalLoader:
        name, samples = self._part(stage)
        return EvalLoader(self._fetch(name, stage), samples, self.eval_batch_size, *self._place())

    def teardown(self, stage: str) -> None:
        """Let the worker processes go."""
        self._fetches.clear()

    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _progress(self, loader: TrainLoader) -> tuple[int, int] | None:
        """(epoch, next batch) by Lightning's counters, if `loader` is what a running fit trains on."""
        trainer = self.trainer
        if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
            return None
        fit = trainer.fit_loop
        return fit.epoch_progress.current.processed, fit.epoch_loop.batch_progress.current.ready  # type: ignore[attr-defined]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """A loader's batch -> (images, labels) for the model; a training batch has its random numbers as third item."""
        pixels, labels, *draw = batch
        if not draw or self._augment is None:
            return self.normalise(pixels), labels
        return self._augment.finish(
            self.normalise(self._augment.geometry(pixels, draw[0])), labels, draw[0]
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, image_size, image_size), (pixels / 255 - mean) / std, scaled last."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (self.mean, self.std)
        )
        out = pixels.float().div_(255).sub_(mean).div_(std)
        if out.shape[-1] == self.image_size:
            return out
        return torch.nn.functional.interpolate(
            out, self.input_shape[1:], mode=self.interpolation, antialias=True
        )
