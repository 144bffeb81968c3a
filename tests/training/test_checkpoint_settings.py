"""Arguments that a checkpoint overrides are reported, and no others."""

import pytest

from tq_lightning.training.checkpoint_settings import overridden_arguments

KEPT = {
    "lr": 0.05,
    "widths": "8,4,2,1",
    "skip": ["first", "last"],
    "model_args": {"expansion": 5, "drop_rate": 0.1},
    "opt": "sgd",
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, []),
        (
            {
                "lr": 0.05,
                "opt": "sgd",
                "widths": [8, 4, 2, 1],
                "skip": "first,last",
                "model_args": {"expansion": 5},
            },
            [],
        ),
        ({"model_args": None, "num_classes": 7}, []),
        ({"lr": 0.01, "opt": "adam"}, ["model.lr=0.05, not 0.01", "model.opt=sgd, not adam"]),
        ({"widths": "8,2"}, ["model.widths=8,4,2,1, not 8,2"]),
        (
            {"model_args": {"expansion": 1}},
            ["model.model_args={'expansion': 5, 'drop_rate': 0.1}, not {'expansion': 1}"],
        ),
    ],
)
def test_only_given_arguments_that_differ_are_reported(given, message):
    assert overridden_arguments(given, KEPT) == message


def test_default_values_are_not_reported():
    assert overridden_arguments({"lr": 0.05, "opt": "sgd"}, {"lr": 0.5, "opt": "adam"}) == []
