"""Compare integer layers with exact integers on this processor, at all widths.

Prints JSON: whether sums are exact here, and the number of wrong outputs by level and width, with
the activation codes that the processor allows ("allowed") and with 8-bit codes everywhere
("forced"). Also run under an emulator of a processor without VNNI.
"""

import json

import torch
from fixtures.integer_oracle import compare
from torch import nn

from tq_lightning import bit_width, prepare
from tq_lightning.quant.activation_ranges import ActivationRange
from tq_lightning.quant.codes import LEVELS
from tq_lightning.quant.integer import integer_model
from tq_lightning.quant.integer.kernels import sums_are_exact


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = torch.rand(2, 16, 6, 6)  # near the top of the range, so that sums grow
    wrong: dict[str, dict[str, int]] = {"allowed": {}, "forced": {}}
    for level in LEVELS:
        layers = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 24)
        with torch.no_grad():
            layers[0].weight.uniform_(0.5, 1.0)  # large codes of one sign
            layers[3].weight.uniform_(-1.0, -0.5)
        model = nn.Sequential(*layers).eval()
        prepare(model, verbose=False, level=level, skip=())
        model.tq_ranges = {"0": ActivationRange(0.0, 1.0), "3": ActivationRange(0.0, 60.0)}
        for name, exact in (("allowed", None), ("forced", True)):
            run = integer_model(model, exact)
            for bits in range(1, 9):
                with torch.inference_mode(), bit_width(run, bits, "truncate"):
                    found = compare(run, images)
                assert len(found) == 2
                wrong[name][f"{level} {bits}"] = sum(a.wrong for a in found.values())
    print(json.dumps({"exact": sums_are_exact(), **wrong}))


if __name__ == "__main__":
    main()
