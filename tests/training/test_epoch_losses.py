"""Epoch losses continue after a resume, with any number of ranks."""

import pytest
import torch

from tq_lightning.training.epoch_losses import EpochLosses


def test_epoch_losses_of_two_ranks_continue_after_a_resume():
    """Each rank resumes with its own sums, and the mean counts every sample once."""
    ranks = [EpochLosses(), EpochLosses()]
    ranks[0].add({"k": torch.tensor(1.0)}, 2)
    ranks[1].add({"k": torch.tensor(4.0)}, 6)
    both = torch.stack([epoch._as_tensor() for epoch in ranks])
    state = ranks[0].state_dict(lambda sums: both)
    again = [EpochLosses(), EpochLosses()]
    for rank, epoch in enumerate(again):
        epoch.load_state_dict(state, rank, 2)
        assert torch.equal(epoch._as_tensor(), ranks[rank]._as_tensor())
    again[1].add({"k": torch.tensor(0.0)}, 2)
    total = torch.stack([epoch._as_tensor() for epoch in again]).sum(0)
    assert again[0].means(lambda sums: total)["k"].item() == pytest.approx((2 + 24) / 10)
    alone = EpochLosses()
    alone.load_state_dict(state)  # fewer ranks: all sums on one rank
    assert alone.means()["k"].item() == pytest.approx(26 / 8)
    old = EpochLosses()
    old.load_state_dict({"k": (torch.tensor(6.0), 3)}, 1, 2)  # the format of version 0.1.0
    assert old.means()["k"].item() == 2.0
