"""TQDataModule: any row of `DATASETS` as a LightningDataModule; its signature is the `data:` section of a configuration."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from tq_lightning.data.augment import BatchAugment
from tq_lightning.data.loader import EvalLoader, Fetch, Items, TrainLoader
from tq_lightning.data.order import TrainOrder, generator, stratified
from tq_lightning.errors import UserError


class TQDataModule(lightning.LightningDataModule):
    """Training, validation and test batches of one data set.

    A batch is (images, labels): images float32 (B, 3, H, W), normalised, on the device; labels int64 (B,), or float (B, classes) under mixup,
    cutmix or label smoothing. The order of epoch e and the augmentation of its batches are functions of (seed, e, batch) alone: the same
    after a resume, and for two processes at batch 64 as for one at 128.

    Validation is the data set's own validation split, or else held out of the training split. Test and predict are the test split, or else
    the data set's validation split (ImageNet has no other).

    Args:
        name: digits, cifar10, cifar100, imagenet, imagefolder or synthetic.
        root: folder of the data: <split>/<class>/<image> or <split>.tar with the same inside, split being train, val or test; for cifar10 and
            cifar100 also torchvision's files; for imagefolder also the class folders themselves, or one tar of them.
        download: let torchvision fetch cifar10 or cifar100 into `root` where nothing is found.
        num_classes: classes to make (synthetic, 10 by default), or to insist on; null takes what the set has.
        image_size: edge of the images in pixels; null is the set's own (digits 8, cifar and synthetic 32), and 224 for folders.
        batch_size: training samples per process and step.
        eval_batch_size: samples per process and step in evaluation; null is twice batch_size, at least 256 for small images.
        workers: processes that read image files; null is one per core up to 8. Small images live in memory and need none.
        val_fraction: share of the training split held out where the set has no validation split; the same images for every seed.
        samples: train on this many samples only, spread evenly over the classes; for synthetic, how many to make (2048).
        mean: per-channel mean of the images in 0..1; null is the set's own.
        std: per-channel standard deviation of the images in 0..1; null is the set's own.
        interpolation: how images are scaled in evaluation: bilinear or bicubic.
        train_interpolation: how image files are scaled in training: random, bilinear or bicubic.
        crop_pct: image files are scaled so that the evaluation crop takes this share of their shorter side.
        pad: black border in pixels of the random crop of small images; null is the set's own (cifar 4).
        hflip: chance to mirror a training image; null is the set's own.
        scale: smallest share of an image file's area that a random crop takes.
        color_jitter: timm's colour jitter; null is the set's own (0.4 for folders).
        auto_augment: timm's policy, for example rand-m9-mstd0.5-inc1; null for none.
        reprob: chance of timm's random erasing.
        remode: what random erasing fills in: const, rand or pixel.
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
        from tq_lightning.data.datasets import DATASETS, Source

        if name not in DATASETS:
            raise UserError(f"data.name={name!r} is not a data set; pass one of {', '.join(DATASETS)}")
        row = self._row = DATASETS[name]
        _check(locals())
        self.name, self.batch_size, self.val_fraction, self.samples = name, batch_size, val_fraction, samples
        self.native_size = min(row["size"], image_size or row["size"]) if name == "synthetic" else row["size"]
        self.image_size = image_size or row["size"] or 224
        self.input_shape = (3, self.image_size, self.image_size)
        self.mean = tuple(mean or row["mean"])
        self.std = tuple(std or row["std"])
        self.interpolation, self.train_interpolation = interpolation, train_interpolation
        self.crop_pct = crop_pct if row["size"] is None else 1.0
        self.eval_batch_size = eval_batch_size or (2 * batch_size if row["size"] is None else max(256, 2 * batch_size))
        self.workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) if workers is None else workers
        self.pad = row["pad"] if pad is None else pad
        self.hflip = row["hflip"] if hflip is None else hflip
        self.scale, self.auto_augment = scale, auto_augment
        self.color_jitter = row["jitter"] if color_jitter is None else color_jitter
        self.reprob, self.remode = reprob, remode
        self.mixup_alpha, self.cutmix_alpha, self.smoothing = mixup, cutmix, smoothing
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self._num_classes = num_classes
        self._source = Source(Path(root).expanduser(), download, num_classes, self.image_size, samples)
        self._splits: dict[str, Any] = {}
        self._fetches: dict[tuple[str, bool], Fetch] = {}
        self._augment: BatchAugment | None = None

    # ---- what a model, a calibration and an export header ask for

    @property
    def num_classes(self) -> int:
        """Classes of the set; reads folder names where they decide."""
        fixed = self._row["classes"] or (self._num_classes or 10 if self.name == "synthetic" else None)
        return fixed or len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        """Names in index order; loads the training split (or, where there is none, the one there is)."""
        return next(iter(self._splits.values())).classes if self._splits else self._any_split().classes

    @property
    def mixup(self) -> Any:
        """timm's Mixup as configured, or None; it also makes the soft targets of label smoothing."""
        if not (self.mixup_alpha or self.cutmix_alpha or self.smoothing):
            return None
        from timm.data.mixup import Mixup

        prob = 1.0 if self.mixup_alpha or self.cutmix_alpha else 0.0
        return Mixup(self.mixup_alpha, self.cutmix_alpha, prob=prob, label_smoothing=self.smoothing, num_classes=self.num_classes)

    # ---- splits

    def _split(self, split: str) -> Any:
        """The named split, read once, or None."""
        if split not in self._splits:
            got = self._row["read"](self._source, split)
            if got is None:
                return None
            expected = self._num_classes
            if expected is not None and len(got.classes) != expected:
                raise UserError(f"data.num_classes={expected}, but {self.name} has {len(got.classes)} classes; leave it null or pass that")
            self._splits[split] = got
        return self._splits[split]

    def _any_split(self) -> Any:
        found = next((s for n in ("val", "test") if (s := self._try(n)) is not None), None) if self._row["classes"] is None else None
        return self._try("train") or found or self._split("train")

    def _try(self, split: str) -> Any:
        try:
            return self._split(split)
        except UserError:
            return None

    def _parts(self, stage: str) -> tuple[str, Tensor]:
        """(split name, sample numbers) of stage train, val or test."""
        if stage == "test":
            for split in ("test", "val"):
                if (got := self._split(split)) is not None:
                    return split, torch.arange(got.labels.numel())
            raise UserError(f"{self.name} has no test split under {self._source.root.absolute()}: looked for test/, test.tar, val/ and val.tar")
        own_val = self._split("val")
        if stage == "val" and own_val is not None:
            return "val", torch.arange(own_val.labels.numel())
        train = self._split("train")
        everything = torch.arange(train.labels.numel())
        keep = torch.ones_like(everything, dtype=torch.bool)
        if own_val is None:
            held = max(1, round(self.val_fraction * everything.numel()))
            keep[stratified(train.labels, held)] = False
            if stage == "val":
                return "train", everything[~keep]
        rest = everything[keep]
        if self.samples is not None and self.samples < rest.numel():
            rest = rest[stratified(train.labels[rest], self.samples)]
        return "train", rest

    def _fetch(self, split: str, training: bool) -> Fetch:
        """How batches of a split are read; kept, so that worker processes are."""
        key = (split, training)
        if key not in self._fetches:
            got = self._split(split)
            picture = got.read is not None or (training and bool(self.auto_augment or self.color_jitter))
            items = Items(got.read or _from_pixels(got), self._transform(training, got.read is not None)) if picture else None
            self._fetches[key] = Fetch(None if picture else got.pixels, got.labels, items, self.workers)
        return self._fetches[key]

    def _transform(self, training: bool, files: bool) -> Any:
        """PIL image -> uint8 tensor: timm's transforms, without what `on_after_batch_transfer` does on the device."""
        from timm.data import create_transform

        if files and not training:
            return create_transform(
                self.image_size, crop_pct=self.crop_pct, interpolation=self.interpolation, mean=self.mean, std=self.std, normalize=False
            )
        whole, ops, last = create_transform(
            self.image_size if files else self.native_size,
            is_training=True,
            scale=(self.scale, 1.0),
            hflip=self.hflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment,
            interpolation=self.train_interpolation,
            mean=self.mean,
            std=self.std,
            normalize=False,
            separate=True,
        )
        return (lambda image: last(ops(whole(image)))) if files else (lambda image: last(ops(image)))

    # ---- Lightning

    def prepare_data(self) -> None:
        """Download on one process where that is allowed and needed."""
        if self.name.startswith("cifar") and self.trainer is not None:
            self._split("train" if self.trainer.training or self.trainer.state.fn == "fit" else "test")

    def setup(self, stage: str) -> None:
        """Read what `stage` needs, so that a missing set is an error before anything starts."""
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            self._parts(part)

    def train_dataloader(self) -> TrainLoader:
        rank, world = self._place()
        split, samples = self._parts("train")
        files = self._split(split).read is not None
        order = TrainOrder(samples, self.batch_size, self.seed, rank, world, even=self.mixup is not None)
        order.shuffle = not (self.trainer is not None and getattr(self.trainer, "overfit_batches", 0))
        augment = BatchAugment(self.seed, 0 if files else self.pad, 0.0 if files else self.hflip, self.reprob, self.remode, self.mixup)
        self._augment = augment
        loader = TrainLoader(self._fetch(split, True), order, augment)
        loader.progress = lambda: self._progress(loader)
        return loader

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def _eval_loader(self, stage: str) -> EvalLoader:
        split, samples = self._parts(stage)
        return EvalLoader(self._fetch(split, False), samples, self.eval_batch_size, *self._place())

    def teardown(self, stage: str) -> None:
        """Let worker processes go."""
        self._fetches.clear()

    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _progress(self, loader: TrainLoader) -> tuple[int, int] | None:
        """(epoch, next batch) by Lightning's counters, where `loader` is the one that a running fit trains on."""
        trainer = self.trainer
        if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
            return None
        fit = trainer.fit_loop
        return fit.epoch_progress.current.processed, fit.epoch_loop.batch_progress.current.ready

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """A loader's batch -> (images, labels) as the model takes them; a training batch brings its `draw` as third item."""
        images, labels, *draw = batch
        if draw and self._augment is not None:
            images = self._augment.geometry(images, draw[0])
        images = self.normalise(images)
        return self._augment.finish(images, labels, draw[0]) if draw and self._augment is not None else (images, labels)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, image_size, image_size): (value / 255 - mean) / std, then scaled where the stored size differs."""
        mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        out = images.float().div_(255).sub_(mean).div_(std)
        if out.shape[-1] != self.image_size:
            mode = self.interpolation
            out = torch.nn.functional.interpolate(out, (self.image_size, self.image_size), mode=mode, antialias=True)
        return out

    def calibration_batches(self, n: int, batch_size: int | None = None, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """`n` batches (images, labels) of training samples as evaluation sees them, for re-estimating norm statistics.

        Always the same ones, whatever the seed, epoch, process or state of any generator, none of which is touched. Fewer than `n` where the
        training part is smaller.
        """
        size = batch_size or self.batch_size
        split, samples = self._parts("train")
        samples = samples[torch.randperm(samples.numel(), generator=generator(8))[: n * size]]
        for images, labels in self._fetch(split, False)(lambda: iter(samples.split(size))):
            yield self.normalise(images.to(device)), labels.to(device)


def _from_pixels(split: Any) -> Any:
    """n -> (PIL image, class number) of a set in memory, for timm's per-image transforms."""
    from PIL import Image

    return lambda n: (Image.fromarray(split.pixels[n].permute(1, 2, 0).numpy()), int(split.labels[n]))


def _check(given: dict[str, Any]) -> None:
    """Ranges of the numbers a user may pass; raises UserError that names the key."""
    for key, low, high in _RANGES:
        value = given[key]
        if value is not None and not low <= value <= high:
            raise UserError(f"data.{key}={value} is out of range; pass {low} to {high}")
    for key, allowed in _CHOICES.items():
        if given[key] not in allowed:
            raise UserError(f"data.{key}={given[key]!r} is not one of {', '.join(allowed)}")
    for key in ("mean", "std"):
        if given[key] is not None and len(given[key]) != 3:
            raise UserError(f"data.{key}={given[key]} needs 3 numbers, one a channel")


_BIG = 10**9
_RANGES = (
    ("batch_size", 1, _BIG), ("eval_batch_size", 1, _BIG), ("workers", 0, 1024), ("samples", 1, _BIG), ("num_classes", 1, _BIG),
    ("image_size", 1, 65536), ("val_fraction", 0.0, 0.9), ("crop_pct", 0.01, 1.0), ("pad", 0, 1024), ("hflip", 0.0, 1.0), ("scale", 0.001, 1.0),
    ("reprob", 0.0, 1.0), ("mixup", 0.0, 1000.0), ("cutmix", 0.0, 1000.0), ("smoothing", 0.0, 0.99), ("color_jitter", 0.0, 10.0), ("seed", 0, 2**63 - 1),
)  # fmt: skip
_CHOICES = {
    "interpolation": ("bilinear", "bicubic"),
    "train_interpolation": ("random", "bilinear", "bicubic"),
    "remode": ("const", "rand", "pixel"),
}
