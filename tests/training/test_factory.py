"""Number of classes of a model when the data set determines it."""

from types import SimpleNamespace

import pytest

from tq_lightning.errors import UserError
from tq_lightning.training.factory import classes_of_data


def test_number_of_classes_comes_from_the_data():
    assert classes_of_data("resnet8_cifar", SimpleNamespace(num_classes=7)) == 7
    with pytest.raises(UserError, match="no data set was given"):
        classes_of_data("resnet8_cifar", None)


def test_only_a_factory_may_omit_the_number_of_classes():
    unknown = SimpleNamespace(num_classes=None)
    assert classes_of_data("package.module:make_model", unknown) is None
    for data in (unknown, SimpleNamespace()):
        with pytest.raises(UserError, match="the data set has no number of classes"):
            classes_of_data("resnet8_cifar", data)
