"""Preprocessing in checkpoints, and the note on class folders that differ."""

from types import SimpleNamespace

import pytest

from tq_lightning.training.preprocessing import preprocessing_of, report_other_classes


def _images(names, data="imagefolder"):
    return SimpleNamespace(
        name=data,
        input_shape=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        interpolation="bicubic",
        crop_pct=0.875,
        class_names=names,
    )


def test_plain_types_of_images_and_nothing_of_other_data():
    assert preprocessing_of(_images(("cat", "dog"))) == {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "classes": ["cat", "dog"],
    }
    assert preprocessing_of(None) is None
    assert preprocessing_of(SimpleNamespace(num_classes=3)) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_images(["cat", "dog"]), ""),
        (_images(["cat", "eel"]), "class 1 is 'dog' there and 'eel' in the data"),
        (_images(["cat"]), "class 1 is 'dog' there and 'none' in the data"),
        (_images(["cat", "eel"], data="cifar10"), ""),  # its classes are fixed
        (None, ""),
    ],
)
def test_first_class_that_differs_is_named(data, message, capsys):
    report_other_classes({"preprocessing": preprocessing_of(_images(["cat", "dog"]))}, data)
    line = capsys.readouterr().err
    assert message in line and bool(line) == bool(message)


def test_a_checkpoint_without_classes_is_not_compared(capsys):
    for checkpoint in ({}, {"preprocessing": None}, {"preprocessing": {}}):
        report_other_classes(checkpoint, _images(["cat"]))
    assert capsys.readouterr().err == ""
