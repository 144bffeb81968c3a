"""A loss with gradients that were computed before, with and without nodes of autograd for them."""

import copy

import pytest
import torch
from torch import nn

from tq_lightning.training.precomputed_gradients import unused_parameters, with_gradients


def build():
    """Parameters in two layouts, and their gradients, one of them in another layout."""
    draw = torch.Generator().manual_seed(0)
    conv = torch.randn(4, 3, 2, 2, generator=draw)
    values = [conv.to(memory_format=torch.channels_last), torch.randn(5, generator=draw)]
    parameters = [nn.Parameter(v) for v in (*values, torch.ones(2))]
    return parameters, [torch.randn(p.shape, generator=draw) for p in parameters[:2]] + [None]


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_backward_equals_that_of_autograd(hook):
    direct, grads = build()
    observed, called = copy.deepcopy(direct), []
    getattr(observed[1], hook)(lambda _: called.append(1))
    for parameters, nodes in ((direct, 1), (observed, 3)):
        for factor in (2.0, 0.5):  # the second pass adds to the gradients of the first
            loss = with_gradients(torch.tensor(3.0), copy.deepcopy(grads), parameters)
            assert loss.item() == 3.0 and unused_parameters(loss)[0] is parameters[2]
            assert sum(node is not None for node, _ in loss.grad_fn.next_functions) == nodes
            (loss * factor).backward()
    assert len(called) == 2
    for p, q, g in zip(direct[:2], observed, grads, strict=False):
        assert torch.equal(p.grad, 2.5 * g) and torch.equal(p.grad, q.grad)
        assert p.grad.stride() == p.stride() == q.grad.stride()
    assert direct[2].grad is None and observed[2].grad is None


def test_removed_hook_needs_no_nodes():
    parameters, grads = build()
    parameters[0].register_hook(lambda g: g).remove()
    loss = with_gradients(torch.tensor(3.0), grads, parameters)
    assert sum(node is not None for node, _ in loss.grad_fn.next_functions) == 1


def test_process_group_gets_the_gradients_from_autograd(tmp_path):
    """DDP adds hooks to the nodes, which a parameter does not show."""
    parameters, grads = build()
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    loss = with_gradients(torch.tensor(3.0), grads, parameters)
    assert sum(node is not None for node, _ in loss.grad_fn.next_functions) == 3
