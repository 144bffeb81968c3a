"""PredictionWriter: bytes of class names, and the file of predictions that are not the run's."""

import os
from types import SimpleNamespace

import pytest
import torch

from tq_lightning.callbacks.prediction_writer import PredictionWriter
from tq_lightning.records import NAME, Record, write_record

OWN = {"data": {"name": "digits", "root": "data"}, "trainer": {"precision": None}}


def test_file_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    names = ["ant", os.fsdecode(b"caf\xe9")]
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(class_names=names),
        world_size=1,
        global_rank=0,
        is_global_zero=True,
    )
    PredictionWriter(tmp_path, OWN).write_on_epoch_end(
        trainer, None, [torch.tensor([[0.25, 0.75], [1.0, 0.0]])], []
    )
    rows = (tmp_path / "predictions.csv").read_bytes().splitlines()
    assert rows[1:] == [b"0,1,caf\xe9,0.750000", b"1,0,ant,1.000000"]


def predict(folder, config, score, batches=1, rank=None, processes=2):
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(class_names=["ant", "bee"]),
        world_size=1 if rank is None else processes,
        global_rank=rank or 0,
        is_global_zero=not rank,
        num_predict_batches=[batches],
        predict_dataloaders=[[None]],
        strategy=SimpleNamespace(broadcast=lambda name: name),
    )
    writer = PredictionWriter(folder, config)
    writer.setup(trainer, SimpleNamespace(predict_step=print), "predict")
    writer.write_on_epoch_end(trainer, None, [torch.tensor([[score, 1 - score]])], [])
    return {
        path.name: path.read_text().splitlines()[1].rpartition(",")[2]
        for path in sorted(folder.glob("*.csv"))
    }


def test_predictions_of_other_data_do_not_replace_those_of_the_run(tmp_path, capsys):
    write_record(tmp_path / NAME, Record("a" * 32, "finished", OWN))
    assert predict(tmp_path, OWN, 0.5) == {"predictions.csv": "0.500000"}
    assert capsys.readouterr().out == f"1 predictions: {tmp_path / 'predictions.csv'}\n"
    more = {**OWN, "data": {"name": "cifar10", "root": "data", "batch_size": 3}}
    found = predict(tmp_path, more, 0.75)
    assert found == {"predictions-other-1.csv": "0.750000", "predictions.csv": "0.500000"}
    assert capsys.readouterr().out == (
        "1 predictions (not of the run's own data (name)): "
        f"{tmp_path / 'predictions-other-1.csv'}\n"
    )
    assert predict(tmp_path, OWN, 0.875) == found | {"predictions.csv": "0.875000"}
    found = predict(tmp_path, more, 1.0, rank=0)  # never a file of an earlier call
    assert found["predictions-other-1.csv"] == "0.750000"
    assert found["predictions-other-2-0.csv"] == "1.000000"


@pytest.mark.parametrize(
    ("batches", "trainer", "why"),
    [
        (0, {}, "data (a part of the split)"),
        (1, {"precision": "bf16-mixed"}, "settings (precision)"),
    ],
)
def test_a_part_and_another_precision_are_not_the_predictions_of_the_run(
    tmp_path, capsys, batches, trainer, why
):
    write_record(tmp_path / NAME, Record("a" * 32, "finished", OWN))
    found = predict(tmp_path, {**OWN, "trainer": trainer}, 0.5, batches)
    assert list(found) == ["predictions-other-1.csv"]
    assert f"(not of the run's own {why})" in capsys.readouterr().out


def test_no_file_of_another_number_of_processes_stays(tmp_path):
    write_record(tmp_path / NAME, Record("a" * 32, "finished", OWN))
    (tmp_path / "predictions-mine.csv").write_text("\nkept,0.1")
    kept = {"predictions-mine.csv": "0.1"}
    assert predict(tmp_path, OWN, 0.5) == kept | {"predictions.csv": "0.500000"}
    for rank in (2, 1, 0):
        found = predict(tmp_path, OWN, 0.625, rank=rank, processes=3)
    assert found == kept | {f"predictions-{rank}.csv": "0.625000" for rank in range(3)}
    found = predict(tmp_path, OWN, 0.75, rank=1)  # only the first process removes files
    assert "predictions-2.csv" in found
    found = predict(tmp_path, OWN, 0.75, rank=0)
    assert found == kept | {f"predictions-{rank}.csv": "0.750000" for rank in range(2)}
    assert predict(tmp_path, OWN, 0.5) == kept | {"predictions.csv": "0.500000"}
