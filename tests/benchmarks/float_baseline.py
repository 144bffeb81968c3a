"""Train the float network of a run: same start, data, optimizer, schedule and epochs, no quantizer.

    python tests/benchmarks/float_baseline.py RUN/config.yaml --seeds 0 1 2 --out float.csv

It shows how much of an accuracy is due to the training budget. The file has one row per seed, with
top-1 in percent on the test split after the last epoch.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pandas as pd
import torch
import yaml
from torch.nn.functional import cross_entropy

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.models import create_model
from tq_lightning.models.weights import load_weights
from tq_lightning.training.optim import optimizer_and_schedule


class FloatNetwork(L.LightningModule):
    """The network of a run without quantizers, trained with its optimizer and schedule."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.model = create_model(config["name"], num_classes=10)
        load_weights(self.model, config["checkpoint_path"])
        self.model.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return cross_entropy(self.model(images.to(memory_format=torch.channels_last)), labels)

    def test_step(self, batch: tuple, batch_idx: int) -> None:
        images, labels = batch
        right = (self.model(images).argmax(1) == labels).float().mean()
        self.log("acc1", 100 * right, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict:
        return optimizer_and_schedule(self.model, self.config, self.trainer)

    def lr_scheduler_step(self, scheduler, metric) -> None:
        scheduler.step_update(self.global_step)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="config.yaml of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    data = {key: value for key, value in config["data"].items() if value is not None}
    rows = []
    for seed in args.seeds:
        L.seed_everything(seed)
        module, source = FloatNetwork(config["model"]), TQDataModule(**data, seed=seed)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        epochs = config["trainer"]["max_epochs"]
        options |= {"accelerator": args.accelerator, "limit_val_batches": 0}
        trainer = L.Trainer(max_epochs=epochs, **options)
        torch.backends.cudnn.allow_tf32 = True  # the default
        trainer.fit(module, source)
        torch.backends.cudnn.allow_tf32 = False  # evaluate in float32
        (result,) = trainer.test(module, source, verbose=False)
        row = {"model": config["model"]["name"], "epochs": epochs, "seed": seed}
        rows.append({**row, "test_acc1": round(result["acc1"], 2)})
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(args.out, index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
