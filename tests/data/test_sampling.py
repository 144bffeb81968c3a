import pytest
import torch

from tq_lightning.data.sampling import (
    TrainOrder,
    derive_seed,
    eval_batches,
    run_seed,
    share,
    stratified,
)
from tq_lightning.errors import UserError


def test_derive_seed_depends_on_each_of_its_numbers():
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert len({derive_seed(a, b) for a in range(20) for b in range(20)}) == 400


@pytest.mark.parametrize("count", [0, 1, 10, 37, 100])
def test_stratified_sample_is_balanced(count):
    labels = torch.arange(100) % 10
    picked = stratified(labels, count)
    assert picked.numel() == count == picked.unique().numel()
    per_class = torch.bincount(labels[picked], minlength=10)
    assert per_class.max() - per_class.min() <= 1


def test_stratified_sample_keeps_one_sample_per_class():
    labels = torch.arange(50)
    assert stratified(labels, 5).numel() == 5
    assert torch.equal(stratified(labels, 5), stratified(labels, 5))
    assert not torch.equal(stratified(labels, 5, seed=1), stratified(labels, 5, seed=2))


@pytest.mark.parametrize(
    ("size", "world"), [(8, 1), (8, 2), (8, 4), (6, 2), (6, 6), (128, 2), (9, 3)]
)
def test_shares_partition_the_batch(size, world):
    parts = [share(size, rank, world) for rank in range(world)]
    assert torch.cat(parts).sort().values.tolist() == list(range(size))
    assert {p.numel() for p in parts} == {size // world}


@pytest.mark.parametrize(("size", "world"), [(8, 2), (24, 3), (128, 4)])
def test_reversing_a_share_gives_the_pairs_of_the_reversed_batch(size, world):
    """Mixup pairs a batch with its reverse; a contiguous share would pair other samples."""
    for rank in range(world):
        mine = share(size, rank, world)
        assert torch.equal(mine.flip(0), size - 1 - mine)
    contiguous = torch.arange(size // world)
    assert not torch.equal(contiguous.flip(0), size - 1 - contiguous)


def test_epoch_is_a_permutation_given_by_seed_and_epoch():
    order = TrainOrder(torch.arange(100, 140), batch_size=10, seed=5)
    epochs = [torch.cat([samples for _, samples in order.batches(e)]) for e in range(2)]
    assert all(e.sort().values.tolist() == list(range(100, 140)) for e in epochs)
    assert not torch.equal(*epochs)
    again = TrainOrder(torch.arange(100, 140), batch_size=10, seed=5)
    assert torch.equal(torch.cat([samples for _, samples in again.batches(1)]), epochs[1])
    late = list(again.batches(1, start=2))
    assert [n for n, _ in late] == [2, 3]
    assert torch.equal(late[0][1], epochs[1][20:30])


def test_two_processes_read_the_steps_of_one():
    samples = torch.arange(100)
    one = TrainOrder(samples, 32, seed=1)
    two = [TrainOrder(samples, 16, seed=1, rank=r, world=2) for r in range(2)]
    assert len(one) == len(two[0]) == 3
    for (_, whole), (_, left), (_, right) in zip(
        one.batches(4), two[0].batches(4), two[1].batches(4), strict=True
    ):
        assert torch.equal(whole, left)
        assert torch.equal(left, right)  # the global batch; `share` is the part of a process


def test_batch_larger_than_the_data_set_is_an_error():
    assert len(TrainOrder(torch.arange(32), 32, seed=0)) == 1
    with pytest.raises(UserError, match=r"data.batch_size=32 is too large: 31 training samples"):
        TrainOrder(torch.arange(31), 32, seed=0)
    with pytest.raises(UserError, match="do not fill a batch of 2 x 32"):
        TrainOrder(torch.arange(40), 32, seed=0, world=2)


@pytest.mark.parametrize("samples", [7, 32, 33, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_every_sample_once(samples, world):
    parts = [eval_batches(torch.arange(samples), 10, rank, world) for rank in range(world)]
    assert sorted(torch.cat([b for p in parts for b in p]).tolist()) == list(range(samples))
    assert len({len(p) for p in parts}) == 1
    assert all(0 < len(b) <= 10 for p in parts for b in p)


def test_evaluation_supports_more_processes_than_samples():
    with pytest.raises(UserError, match="use fewer devices"):
        eval_batches(torch.arange(2), 10, 0, 3)


@pytest.mark.parametrize("seed", ["abc", "-1", "1.5", ""])
def test_seed_from_the_environment_is_checked(seed, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert run_seed() == 7
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    with pytest.raises(UserError, match=f"PL_GLOBAL_SEED={seed} is not a seed"):
        run_seed()
