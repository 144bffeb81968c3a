"""`validate` on a trained float network, with scales that keep or shrink its weights."""

import re
from itertools import pairwise

import pytest
import torch
from timm.models import register_model
from torch import nn

from tq_lightning.cli import main
from tq_lightning.data.datamodule import TQDataModule


class NetworkWithoutNorms(nn.Module):
    """Six linear layers with GELU, without norms that would compensate a change of scale."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.num_classes = num_classes
        sizes = [192, 64, 64, 64, 64, 64]
        layers = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.body, self.head = nn.Sequential(nn.Flatten(), *layers), nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


@register_model
def network_without_norms_for_tests(pretrained=False, num_classes=10, **kwargs):
    return NetworkWithoutNorms(num_classes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the weights of a network that was trained on digits in float."""
    torch.manual_seed(0)
    data = TQDataModule(name="digits", batch_size=64)
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch) for batch in data.train_dataloader()]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = NetworkWithoutNorms()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("float") / "float.pth"
    torch.save(model.state_dict(), path)
    return path


def table(trained, tmp_path, capsys, **choices):
    """Return truncated top-1 in % by width, from `validate` on the start weights."""
    options = {"level": "centre", "normalizer": "absmax_channel", **choices}
    arguments = [f"--model.{key}={value}" for key, value in options.items()]
    status = main(
        [
            "validate",
            "--model.name=network_without_norms_for_tests",
            f"--model.checkpoint_path={trained}",
            "--data.name=digits",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={tmp_path}",
            *arguments,
        ]
    )
    out = capsys.readouterr().out
    assert status == 0
    found = {f"w{w}": float(v) for w, v in re.findall(r"w(\d) [\d.]+/([\d.]+)", out)}
    return found | {"float": float(re.search(r"float ([\d.]+)", out)[1])}


def test_span_keeps_the_accuracy_of_a_float_network_and_mean_does_not(trained, tmp_path, capsys):
    span = table(trained, tmp_path, capsys, scale="span")
    assert span["float"] > 85
    assert span["w8"] > span["float"] - 1 and span["w6"] > span["float"] - 4
    assert span["w4"] > span["w1"] and span["w1"] < 60
    mean = table(trained, tmp_path, capsys, scale="mean")
    assert mean["float"] == span["float"] and mean["w8"] < span["w8"] - 30


@pytest.mark.parametrize("normalizer", ["gaussian", "float_e2"])
def test_non_uniform_codes_keep_the_accuracy_of_a_float_network(
    trained, tmp_path, capsys, normalizer
):
    choices = {"normalizer": normalizer, "level": "centroid", "scale": "span"}
    found = table(trained, tmp_path, capsys, **choices)
    assert found["w8"] > found["float"] - 1 and found["w4"] > found["float"] - 10


def test_unsupported_pairing_is_an_error_of_one_line(trained, capsys):
    arguments = ["--model.normalizer=gaussian", f"--model.checkpoint_path={trained}"]
    assert main(["validate", *arguments, "--data.name=digits"]) == 2
    error = capsys.readouterr().err
    assert "level 'endpoint' is not supported with normalizer 'gaussian'" in error
    assert "pass level centroid" in error
    assert "Traceback" not in error and error.strip().count("\n") == 0
