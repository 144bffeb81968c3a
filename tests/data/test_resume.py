"""A run stopped inside an epoch and resumed sees the batches of the uninterrupted run."""

import contextlib

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.errors import UserError


class RecordBatches(lightning.LightningModule):
    """Keep every training batch; `stop` ends the run after that many."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.layer, self.stop, self.seen = torch.nn.Linear(1, 1), stop, []
        self.validated = 0

    def training_step(self, batch, batch_idx):
        if self.stop is not None and len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append([t.clone() for t in batch] + [batch_idx])
        torch.rand(7)  # random numbers drawn by a model must not change the data
        return self.layer(batch[0].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create 24 JPEGs of 40x30 in 2 classes, train/ only."""
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        path = root / "train" / f"class{number % 2}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(
            0, 256, (30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
        )
        Image.fromarray(noise.numpy()).save(path)
    return root


def fit(data, root, epochs=2, stop=None, resume=None, every=3, when=None, **flags):
    model = RecordBatches(stop)
    when = when or {"every_n_train_steps": every}
    keep = ModelCheckpoint(root, save_top_k=-1, filename="{step}", save_on_exception=False, **when)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[keep], logger=False,
        enable_progress_bar=False, enable_model_summary=False, **flags,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(model, TQDataModule(**data), ckpt_path=resume, weights_only=True)
    return model


def assert_same(got, expected):
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert ours[2] == theirs[2]
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


SMALL = {
    "name": "digits",
    "batch_size": 32,
    "samples": 256,
    "hflip": 0.5,
    "reprob": 0.5,
    "mixup": 0.2,
    "cutmix": 1.0,
    "seed": 3,
}


# 8 batches an epoch: a checkpoint inside the first epoch, at its last batch, and inside the second
@pytest.mark.parametrize(("every", "stop", "step"), [(3, 5, 3), (4, 9, 8), (5, 12, 10)])
def test_in_memory_data_resumes_with_the_same_batches(tmp_path, every, stop, step):
    whole = fit(SMALL, tmp_path / "a", every=every)
    assert [b[2] for b in whole.seen] == 2 * list(range(8))
    cut = fit(SMALL, tmp_path / "b", every=every, stop=stop)
    assert_same(cut.seen, whole.seen[:stop])
    rest = fit(SMALL, tmp_path / "b", every=every, resume=tmp_path / "b" / f"step={step}.ckpt")
    assert_same(rest.seen, whole.seen[step:])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_image_files_resume_with_the_same_batches(folder, tmp_path, workers):
    data = {
        "name": "imagefolder",
        "root": str(folder),
        "image_size": 16,
        "batch_size": 4,
        "workers": workers,
        "seed": 1,
    }
    data |= {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "reprob": 0.5,
        "val_fraction": 0.17,
    }  # 20 to train on, 4 held out
    whole = fit(data | {"workers": 0}, tmp_path / "a")
    assert len(whole.seen) == 10
    assert not torch.equal(whole.seen[0][0], whole.seen[5][0])
    cut = fit(data, tmp_path / "b", stop=4)
    assert_same(cut.seen, whole.seen[:4])
    rest = fit(data, tmp_path / "b", resume=tmp_path / "b" / "step=3.ckpt")
    assert_same(rest.seen, whole.seen[3:])


@pytest.mark.parametrize("after_training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_resuming_at_the_end_of_an_epoch_starts_the_next_one(tmp_path, after_training):
    """Checkpoints written before and after the validation that ends an epoch."""
    whole = fit(SMALL, tmp_path / "a", epochs=3)
    when = {"every_n_epochs": 1, "save_on_train_epoch_end": after_training}
    fit(SMALL, tmp_path / "b", epochs=3, stop=11, when=when)
    rest = fit(SMALL, tmp_path / "b", epochs=3, resume=tmp_path / "b" / "step=8.ckpt", when=when)
    assert_same(rest.seen, whole.seen[8:])


def test_max_steps_and_limited_epochs_resume_with_the_same_batches(tmp_path):
    """Lightning treats every resume as a restart if max_steps ends the run."""
    flags = {"epochs": -1, "max_steps": 12, "limit_train_batches": 5}
    whole = fit(SMALL, tmp_path / "a", **flags)
    assert [b[2] for b in whole.seen] == [*range(5), *range(5), 0, 1]
    for every, stop, step in ((3, 8, 6), (5, 7, 5)):
        fit(SMALL, tmp_path / f"b{every}", every=every, stop=stop, **flags)
        rest = fit(
            SMALL,
            tmp_path / f"b{every}",
            every=every,
            resume=tmp_path / f"b{every}" / f"step={step}.ckpt",
            **flags,
        )
        assert_same(rest.seen, whole.seen[step:])


def test_validation_inside_an_epoch_does_not_change_the_batches(tmp_path):
    whole = fit(SMALL, tmp_path / "a", num_sanity_val_steps=0, limit_val_batches=0)
    often = fit(SMALL, tmp_path / "b", num_sanity_val_steps=2, val_check_interval=2)
    assert often.validated > 0
    assert_same(often.seen, whole.seen)


def test_another_seed_gives_another_order(tmp_path):
    one, two = (fit(SMALL | {"seed": seed}, tmp_path / str(seed), epochs=1) for seed in (3, 4))
    assert not torch.equal(one.seen[0][0], two.seen[0][0])


def test_resuming_an_epoch_in_another_order_is_an_error(tmp_path):
    fit(SMALL, tmp_path, stop=5)
    with pytest.raises(UserError, match="global batch size"):
        fit(SMALL | {"batch_size": 16}, tmp_path, resume=tmp_path / "step=3.ckpt")
