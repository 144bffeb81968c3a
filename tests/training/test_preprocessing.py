"""Preprocessing in checkpoints, and the note on class folders that differ."""

from types import SimpleNamespace

import pytest

from tq_lightning.training.preprocessing import (
    export_fields,
    preprocessing_of,
    report_other_classes,
)


def image_data(names, data="imagefolder"):
    return SimpleNamespace(
        name=data,
        input_shape=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        interpolation="bicubic",
        crop_pct=0.875,
        class_names=names,
    )


def test_preprocessing_of_images_has_plain_types_and_is_none_for_other_data():
    assert preprocessing_of(image_data(("cat", "dog"))) == {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "classes": ["cat", "dog"],
    }
    assert preprocessing_of(None) is None
    assert preprocessing_of(SimpleNamespace(num_classes=3)) is None
    assert preprocessing_of(SimpleNamespace(class_names=["0", "1"])) is None  # no names
    assert preprocessing_of(SimpleNamespace(class_names=["up", "down"])) == {
        "classes": ["up", "down"]
    }


def test_only_a_network_of_other_inputs_than_images_stores_them():
    rows = [{"name": "x", "shape": [3], "type": "float32"}]
    images, series = image_data(["cat"]), SimpleNamespace(class_names=["up", "down"])
    assert list(export_fields(images, rows)) == ["preprocessing"]
    assert export_fields(series, rows)["inputs"] == rows
    assert export_fields(None, rows) == {"inputs": rows}
    assert export_fields(None, []) == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (image_data(["cat", "dog"]), ""),
        (image_data(["cat", "eel"]), "class 1 is 'dog' there and 'eel' in the data"),
        (image_data(["cat"]), "class 1 is 'dog' there and 'none' in the data"),
        (image_data(["cat", "eel"], data="cifar10"), ""),  # its classes are fixed
        (None, ""),
    ],
)
def test_first_class_that_differs_is_named(data, message, capsys):
    report_other_classes({"preprocessing": preprocessing_of(image_data(["cat", "dog"]))}, data)
    line = capsys.readouterr().err
    assert message in line and bool(line) == bool(message)


def test_a_checkpoint_without_classes_is_not_compared(capsys):
    for checkpoint in ({}, {"preprocessing": None}, {"preprocessing": {}}):
        report_other_classes(checkpoint, image_data(["cat"]))
    assert capsys.readouterr().err == ""
