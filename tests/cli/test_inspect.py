"""The verb inspect: tables, record, and one-line errors."""

import json

import pytest

from tq_lightning.cli import inspect_tables
from tq_lightning.cli import main as cli
from tq_lightning.cli.inspect import main
from tq_lightning.cost.record import inspect_record, mechanism
from tq_lightning.errors import UserError


def test_resnet50_prints_both_ratios_and_their_accounting(capsys):
    assert main(["--model.name", "resnet50"]) == 0
    out = capsys.readouterr().out
    assert "3.533x" in out and "2.914x" in out
    for words in (
        "25,557,032",
        "28,934,816",
        "35,079,024",
        "layer4.2.conv3",
        "DRAM access, 64 bits 1300",
    ):
        assert words in out
    assert "\x1b" not in out and "━" not in out  # plain text if the output is not a terminal


def test_tables_drop_columns_in_a_narrow_terminal(capsys, monkeypatch):
    """Omitted columns are named, text wraps, and a wider terminal shows more."""
    shown = {}
    for width in (80, 120):
        monkeypatch.setattr(inspect_tables, "_width", lambda width=width: width)
        assert main(["--model.name", "preresnet20_cifar"]) == 0
        shown[width] = capsys.readouterr().out
        assert max(map(len, shown[width].splitlines())) <= width
    assert "not shown in 80 columns: paper, master8" in shown[80]
    assert "not shown" not in shown[120]
    assert "layer3.2.conv2" in shown[80] and "float_master" in shown[80]


def test_sizes_in_the_record_add_up(tmp_path, capsys):
    path = tmp_path / "r8.json"
    assert main(["--model.name=resnet8_cifar", "--model.skip=first", f"--out={path}"]) == 0
    record = json.loads(path.read_text())
    assert (record["schema"], record["kind"], record["model"]) == (1, "inspect", "resnet8_cifar")
    assert record["policy"]["skip"] == ["first"] and record["parameters"] == 75_290
    assert record["quantized_parameters"] == 75_290 - 432 - 480 - 10
    for way, size in record["ways"].items():
        parts = {key: size[key] for key in ("weights", "scales", "float", "norms")}
        assert size["total"] == sum(parts.values())
        assert size["total"] == sum(layer["bytes"][way] for layer in record["layers"])
    assert sum(layer["parameters"] for layer in record["layers"]) == record["parameters"]
    assert record["policy_ratio"] == 4 * 75_290 / record["ways"]["packed"]["total"]
    assert record["read_at"]["8"] == record["ways"]["master8"]["total"]
    assert {"round", "round_shifted", "floor"} <= record["mechanism"].keys()
    assert record["energy"]["by_width"].keys() == {str(n) for n in range(1, 9)}
    assert [p.name for p in tmp_path.iterdir()] == ["r8.json"]
    assert "r8.json" in record["command"]


def test_policy_changes_the_packed_size_but_not_the_paper_accounting():
    base = {
        "name": "resnet20_cifar",
        "num_classes": None,
        "model_args": {},
        "norm": "per_width",
        "normalizer": "tanh",
    }
    base |= {"skip": ["first", "last"], "widths": [4, 2], "max_bits": 4, "activations": None}
    four = inspect_record(base)
    shared = inspect_record({**base, "norm": "shared", "widths": [8], "max_bits": 8})
    assert four.paper_ratio == shared.paper_ratio
    assert four.ways["packed"].weights * 2 == shared.ways["packed"].weights
    assert four.ways["packed"].norms == 4 * shared.ways["packed"].norms
    assert list(four.read_at) == [1, 2, 3, 4]


def test_lists_and_nulls_of_sweep_engines_are_accepted(capsys):
    for skip, widths in (
        ("[first, last]", "[8,4]"),
        ("first,last", "8,4"),
        ("first, last", "4, 8"),
    ):
        assert (
            main(["--model.name=resnet8_cifar", f"--model.skip={skip}", f"--model.widths={widths}"])
            == 0
        )
    assert main(["--model.name=resnet8_cifar", "--model.skip=[]", "--model.num_classes=None"]) == 0
    assert "in float: nothing" in capsys.readouterr().out
    assert main(["--model.name=preresnet20_cifar", "--model.model_args={expansion: 5}"]) == 0
    assert "6,758,810" in capsys.readouterr().out


def test_model_section_of_a_configuration_is_read(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        "model:\n  name: resnet8_cifar\n  quantizer: floor\n  skip: [first]\n"
        "data:\n  name: digits\n"
    )
    assert main(["--config", str(config)]) == 0
    assert "in float: first;" in capsys.readouterr().out
    config.write_text("model: {name: resnet8_cifar, lr: 0.1, normalizr: absmax}")
    with pytest.raises(UserError, match=r"unknown key model\.normalizr; did you mean normalizer"):
        main(["--config", str(config)])
    config.write_text("model: {name: resnet8_cifar, lr: 0.1, skip: [first]}")
    assert main(["--config", str(config), "--model.skip=last"]) == 0
    assert "in float: last;" in capsys.readouterr().out


def test_mechanism_shows_that_floor_equals_its_shift_and_round_does_not():
    lines = mechanism()
    assert len(lines.u) == len(lines.floor[1]) and 0 < lines.u[0] < lines.u[-1] < 1
    differ = {
        n: sum(a != b for a, b in zip(lines.round[n], lines.round_shifted[n], strict=True))
        for n in (1, 2, 3, 4)
    }
    assert differ[1] == 0 and min(differ[n] for n in (2, 3, 4)) > 50
    for n in (1, 2, 3, 4):
        assert len(set(lines.floor[n])) == 2**n


BAD = {
    "no model": ([], "pass --model.name"),
    "empty model": (["--model.name="], "model.name: got '', pass the name of a model"),
    "model as a number": (["--model.name=5"], "model.name: got '5', pass the name of a model"),
    "unknown model": (["--model.name=resnet5O"], "unknown model"),
    "name without its key": (["resnet18"], "arguments: resnet18; pass the name of a model as --mo"),
    "negative classes": (
        ["--model.name=resnet8_cifar", "--model.num_classes=-1"],
        "model.num_classes: got -1, pass an integer >= 0 or null",
    ),
    "classes as text": (
        ["--model.name=resnet8_cifar", "--model.num_classes=ten"],
        "model.num_classes: got 'ten', pass an integer >= 0 or null",
    ),
    "unknown key": (["--model.name=resnet8_cifar", "--model.skp=first"], "unrecognized"),
    "pattern": (["--model.name=resnet8_cifar", "--model.skip=layer9.*"], "layer9"),
    "width": (["--model.name=resnet8_cifar", "--model.widths=9"], "widths"),
    "no number": (["--model.name=resnet8_cifar", "--model.widths=eight"], "expected integers"),
    "norm": (["--model.name=resnet8_cifar", "--model.norm=batch"], "norm"),
    "argument": (["--model.name=resnet8_cifar", "--model.model_args={shade: red}"], "shade"),
    "own key": (
        ["--model.name=resnet8_cifar", "--model.model_args={num_classes: 5}"],
        "pass model.num_classes",
    ),
    "no mapping": (["--model.name=resnet8_cifar", "--model.model_args=3"], "model_args"),
    "yaml": (["--model.name=resnet8_cifar", "--model.skip=[first"], "model.skip"),
    "config": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "out": (["--model.name=resnet8_cifar", "--out=nowhere/x.json"], "folder that exists"),
    "suffix": (["--model.name=resnet8_cifar", "--out=x.txt"], "ends in .json"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_is_an_error_of_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = BAD[case]
    with pytest.raises(UserError, match=words) as caught:
        main(argv)
    assert "\n" not in str(caught.value)
    assert cli(["inspect", *argv]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
