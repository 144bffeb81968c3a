"""The share of weight codes that truncation changes."""

import pytest
import torch

from tq_lightning.models import create_model
from tq_lightning.quant.disagreement import code_disagreement
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.quantized_tensors import weight_quantizers


def test_only_round_codes_disagree_after_truncation():
    """Floor never disagrees. Round does at 2..7 bits; 1 and 8 bits agree except for ties."""
    for quantizer in ("floor", "round"):
        torch.manual_seed(0)
        model = create_model("resnet8_cifar", num_classes=10)
        prepare(model, quantizer=quantizer, verbose=False)
        got = code_disagreement(model)
        if quantizer == "floor":
            assert set(got) == set(range(1, 9)) and not any(got.values())
    assert got[8] == 0 and got[1] < 1e-3 and all(got[b] > 0.005 for b in range(2, 8))
    differ = total = 0
    for item in weight_quantizers(model):
        u = item.quantizer.normalize(item.original).u
        differ += int(
            (torch.round(3 * u) != torch.div(torch.round(255 * u), 64, rounding_mode="floor")).sum()
        )
        total += u.numel()
    assert got[2] == pytest.approx(differ / total)
