"""PredictionWriter: class names that are not UTF-8 keep their bytes."""

import os
from types import SimpleNamespace

import torch

from tq_lightning.callbacks.prediction_writer import PredictionWriter


def test_file_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    names = ["ant", os.fsdecode(b"caf\xe9")]
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(class_names=names), world_size=1, global_rank=0
    )
    PredictionWriter(tmp_path).write_on_epoch_end(
        trainer, None, [torch.tensor([[0.25, 0.75], [1.0, 0.0]])], []
    )
    rows = (tmp_path / "predictions.csv").read_bytes().splitlines()
    assert rows[1:] == [b"0,1,caf\xe9,0.750000", b"1,0,ant,1.000000"]
