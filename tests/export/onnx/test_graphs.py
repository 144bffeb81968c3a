"""torch.export at a fixed width, and torch.compile without a recompile per batch."""

import pytest
import torch

from tq_lightning import bit_width, load_packed


@pytest.mark.parametrize("mode", ["resident", "lean"])
def test_torch_export_keeps_codes_and_gives_the_same_logits(packed, net, mode):
    model = load_packed(packed, bits=3, mode=mode)
    program = torch.export.export(model, (net[1],), strict=False)
    with torch.no_grad():
        assert torch.equal(program.module()(net[1]), model(net[1]))
    stored = [t for t in program.state_dict.values() if t.dtype == torch.uint8]
    assert len(stored) == 6  # the weights stay integers
    assert not any(
        t.is_floating_point() and t.numel() > 1000
        for t in program.state_dict.values()
        if t.dim() == 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "lean"])
def test_torch_compile_makes_one_graph_per_width_for_all_batch_sizes(packed, net, mode):
    torch._dynamo.reset()
    model, graphs = load_packed(packed, mode=mode), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    with torch.no_grad():
        for bits in (8, 2):
            with bit_width(model, bits):
                expected = model(net[1])
                for _ in range(4):
                    torch.testing.assert_close(compiled(net[1]), expected, rtol=0, atol=1e-5)
        before = len(graphs)
        for bits in (2, 8, 2):
            with bit_width(model, bits):
                for shift in range(3):
                    compiled(net[1] + shift)
    torch._dynamo.reset()
    assert before <= 4  # the weights of a width may be cached or not
    assert len(graphs) == before if mode == "lean" else len(graphs) <= 4
