"""The line of accuracies by width that follows each validation."""

from tq_lightning.callbacks.width_table import print_widths


def test_table_has_one_column_per_width(capsys):
    metrics = {"val/acc1_float": 90.0}
    print_widths(metrics, "val", "epoch 0")
    assert capsys.readouterr().out == ""
    metrics |= {
        f"val/{key}_w{b}": v
        for b in (8, 2)
        for key, v in (("acc1_quantize", 80.0), ("acc1_truncate", 30.0), ("qt_gap", 50.0))
    }
    print_widths(metrics, "val", "epoch 0")
    assert (
        capsys.readouterr().out
        == "epoch 0: top-1 % quantized/truncated  w8 80.00/30.00  w2 80.00/30.00  float 90.00\n"
    )
