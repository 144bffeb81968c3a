"""part_of_split: loaders with and without a length."""

import math

import pytest

from tq_lightning.callbacks.own_data import part_of_split


@pytest.mark.parametrize(
    ("batches", "loaders", "part"),
    [
        ([3], "abc", None),
        ([2], "abc", 2),
        ([3, 1], ["abc", "d"], None),
        ([3, 1], ["abc", "de"], 4),
        ([math.inf], iter("abc"), None),
        ([2], iter("abc"), 2),
    ],
)
def test_an_evaluation_of_fewer_batches_is_of_a_part(batches, loaders, part):
    assert part_of_split(batches, loaders) == part
