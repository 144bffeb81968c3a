"""Time series: files of the .ts format, padding and lengths, and the networks for them."""

import numpy as np
import pytest
import torch

from tq_lightning import bit_width, prepare
from tq_lightning.data.timeseries import Series, aeon_series, read_ts
from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.training.joint import joint_loss

TS = "# comment\n@problemName x\n@data\n1,2,3:4,5,6:a\n7,8:9,10:b\n"


def test_series_are_read_and_padded(tmp_path):
    path = tmp_path / "x_TRAIN.ts"
    path.write_text(TS)
    series, labels = read_ts(path)
    assert [s.tolist() for s in series] == [[[1, 2, 3], [4, 5, 6]], [[7, 8], [9, 10]]]
    assert labels == ["a", "b"]
    data = Series(series, [0, 1], labels, 4, np.array([1.0, 4.0]), np.array([2.0, 1.0]))
    (x, length), label = data[1]
    assert (length, label) == (2, 1)
    assert x.tolist() == [[3, 3.5, 0, 0], [5, 6, 0, 0]]
    path.write_text("@data\n1,2:3:a\n")
    with pytest.raises(UserError, match="series 1 can't be read"):
        read_ts(path)
    path.write_text("@data\n")
    with pytest.raises(UserError, match="has no labeled series"):
        read_ts(path)


@pytest.mark.parametrize(
    ("line", "meaning"), [("@targetLabel", "numbers to predict"), ("@timestamps", "pairs of time")]
)
def test_series_without_classes_are_refused(tmp_path, line, meaning):
    path = tmp_path / "x_TRAIN.ts"
    path.write_text(TS.replace("@data", f"{line} false\n@data"))
    assert read_ts(path)[1] == ["a", "b"]
    path.write_text(TS.replace("@data", f"{line} true\n@data"))
    with pytest.raises(UserError, match=rf"{path}: '{line} true' means that .*{meaning}"):
        read_ts(path)


@pytest.mark.parametrize("name", ["cnn", "lstm", "transformer"])
def test_padding_does_not_change_the_logits(name):
    net = create_model(f"tq_lightning.models.sequence:{name}", 3, channels=2, width=8).eval()
    x = torch.randn(2, 2, 6)
    x[1, :, 4:] = 0
    lengths = torch.tensor([6, 4])
    longer = torch.cat([x, torch.zeros(2, 2, 3)], 2)
    if name != "lstm":  # a reversed sequence starts with the padding
        torch.testing.assert_close(net(x, lengths), net(longer, lengths))
    assert not torch.allclose(net(x, lengths), net(x, torch.tensor([6, 3])))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "lstm", "transformer"])
def test_networks_train_jointly_and_floor_truncates_exactly(name):
    net = create_model(f"tq_lightning.models.sequence:{name}", 3, channels=2, width=8)
    prepare(net, norm="per_width_all", widths=(8, 2), verbose=False)
    assert weight_quantizers(net)
    inputs = (torch.randn(4, 2, 6), torch.tensor([6, 5, 4, 3]))
    target = torch.tensor([0, 1, 2, 0])
    loss, _ = joint_loss(
        net, inputs, (8, 2), lambda bits, out, _: torch.nn.functional.cross_entropy(out, target)
    )
    loss.backward()
    assert all(w.original.grad.abs().sum() > 0 for w in weight_quantizers(net))
    net.eval()
    with torch.no_grad(), bit_width(net, 2):
        quantized = net(*inputs)
    with torch.no_grad(), bit_width(net, 2, "truncate"):
        assert torch.equal(net(*inputs), quantized)


def test_unknown_problem_is_an_error_of_one_line():
    pytest.importorskip("aeon", reason="the files of aeon are optional")
    with pytest.raises(UserError, match="aeon has no data set 'x'; pass one of") as error:
        aeon_series("x")
    assert str(error.value).count("JapaneseVowels") == 1
    train, test = aeon_series()
    assert (len(train), len(test), len(train.classes)) == (270, 370, 9)
