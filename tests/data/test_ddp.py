"""Two processes under Lightning's DDP read the same samples as one process."""

import csv
import hashlib
import subprocess
import sys

import lightning
import pytest
import torch

from tq_lightning.data.datamodule import TQDataModule

KEYS = {"name": "digits", "samples": 320, "hflip": 0.5, "mixup": 0.2, "reprob": 0.5, "seed": 2}


class RecordSamples(lightning.LightningModule):
    """Write one line per sample: stage, epoch, step, hash of the image."""

    def __init__(self, path):
        super().__init__()
        self.layer, self.path = torch.nn.Linear(1, 1), path

    def note(self, stage, batch, batch_idx):
        with open(f"{self.path}.{self.global_rank}", "a") as file:
            for image in batch[0]:
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                csv.writer(file).writerow(
                    [stage, self.current_epoch, batch_idx if stage == "train" else 0, digest]
                )

    def training_step(self, batch, batch_idx):
        self.note("train", batch, batch_idx)
        return self.layer(batch[0].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.note("val", batch, batch_idx)
        self.log(
            "mean", batch[0].mean(), sync_dist=True
        )  # a collective: hangs unless all have equally many batches

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(path, devices, batch_size):
    strategy = "ddp_fork" if devices > 1 else "auto"
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=devices, strategy=strategy, logger=False,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(
        RecordSamples(path), TQDataModule(batch_size=batch_size, eval_batch_size=33, **KEYS)
    )


def recorded_samples(path, devices, batch_size):
    """Return the sorted lines of a run in a new process, which can be forked safely."""
    subprocess.run(
        [sys.executable, __file__, str(path), str(devices), str(batch_size)],
        check=True,
        timeout=300,
    )
    return sorted(line for rank in range(devices) for line in open(f"{path}.{rank}"))


@pytest.mark.slow
def test_two_processes_read_the_samples_of_one(tmp_path):
    one, two = recorded_samples(tmp_path / "one", 1, 64), recorded_samples(tmp_path / "two", 2, 32)
    assert len(one) == 2 * (320 + 144)
    assert one == two


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
