"""record.json: existing files are read, wrong values are named, no other module reads it."""

import ast
import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from fixtures.records import inspect, run

from tq_lightning import records
from tq_lightning.errors import UserError
from tq_lightning.records import (
    STORAGE_BYTES,
    STORAGE_LABELS,
    Record,
    RecordError,
    mark_superseded,
    parse,
    read_any,
    read_record,
    value_of,
    write_record,
)

ROOT = Path(__file__).parents[1]
COMMITTED = sorted(ROOT.glob("results/runs/**/record.json"))[:20]
COMMITTED += sorted(ROOT.glob("results/inspect/*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: str(p.relative_to(ROOT / "results")))
def test_committed_record_round_trip_is_unchanged(path, tmp_path):
    record = read_any(path)
    write_record(tmp_path / "copy.json", record)
    assert json.loads((tmp_path / "copy.json").read_text()) == json.loads(path.read_text())


def test_fields_of_later_versions_are_kept(tmp_path):
    write_record(tmp_path / "record.json", parse(run() | {"carbon": {"kg": 2}}))
    assert json.loads((tmp_path / "record.json").read_text())["carbon"] == {"kg": 2}


def nested(depth):
    tree = []
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": None}, "broken: id is missing"),
        ({"steps": 1.5}, "broken: steps is '1.5', not an integer"),
        ({"steps": True}, "broken: steps is 'True', not an integer"),
        ({"seconds": float("inf")}, "broken: seconds is 'inf', not a number"),
        ({"dirty": "no"}, "broken: dirty is 'no', not true or false"),
        ({"best": {"epoch": 1}}, "broken: best.metrics is missing"),
        (
            {"best": {"metrics": {"val/acc1_float": "x"}}},
            "broken: best.metrics.val/acc1_float is 'x', not a number",
        ),
        ({"bytes": {"planes": {"8": "x"}}}, "broken: bytes.planes.8 is 'x', not an integer"),
        ({"config": {"trainer": 3}}, "broken: config.trainer is '3', not a mapping"),
        (
            {"config": {"model": {"widths": "eight"}}},
            "broken: config.model.widths is 'eight', not a list of widths",
        ),
        ({"bytes": {"planes": {"²": 1}}}, "broken: bytes.planes has a key that is not a width in"),
        ({"config": {"model": {"widths": "8,²"}}}, "broken: config.model.widths is '8,²', not a"),
        (
            {"test": {"metrics": {"test/acc1_truncate_w2": 900}}},
            "broken: test.metrics.test/acc1_truncate_w2 is 900, not an accuracy from 0 to 100 %",
        ),
        (
            {"best": {"metrics": {"val/acc5_float": -1}}},
            "broken: best.metrics.val/acc5_float is -1, not an accuracy",
        ),
        (
            {"curves": {"val/acc1_truncate_w2": [[0, 9.0], [1, 101.5]]}},
            "broken: curves.val/acc1_truncate_w2[1] is 101.5, not an accuracy",
        ),
        (
            {
                "best": {"metrics": {"val/acc1_truncate_w2": 9}},
                "widths": {"2": {"quantize": 9, "truncate": 101}},
            },
            "broken: widths.2.truncate is 101, not an accuracy",
        ),
        ({"bytes": {"planes": {"8": -3}}}, "broken: bytes.planes.8 is -3, not a number of bytes"),
        ({"later": nested(900)}, "broken: more than 100 nested mappings or lists"),
        ({"kind": "sweep"}, "kind 'sweep'; supported kinds are run and inspect"),
    ],
)
def test_invalid_value_is_named(change, reason):
    with pytest.raises(RecordError) as caught:
        parse(run() | change)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("widths", [8, "8", "8,", "(8,4)", "[8, 4]", "8.0,4.0", [8, 4], ["8"]])
def test_widths_are_accepted_in_every_form_of_the_command_line(widths):
    assert parse(run(config={"model": {"widths": widths}})).config["model"]["widths"] == widths


def test_inspect_record_needs_the_reference_scheme():
    tree = inspect()
    del tree["ways"]["float_master"]
    with pytest.raises(RecordError, match=r"ways\.float_master is missing"):
        parse(tree)


def test_every_storage_scheme_has_a_label():
    from tq_lightning.cost.size import WAYS

    assert list(STORAGE_LABELS) == list(WAYS)


# an integer that no float can hold
HUGE = '{"schema": 1, "id": "a", "status": "finished", "config": {}, "seconds": 1%s}' % ("0" * 400)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', "\x00", "[" * 100_000, HUGE])
def test_damaged_record_is_an_error_of_one_line_with_its_path(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_objective_is_the_value_of_the_last_epoch_or_the_packed_size():
    tree = run(bytes={"packed": 1234})
    tree["last"] = {"epoch": 3, "metrics": {"val/acc1_float": 50.0}}
    record = parse(tree)
    assert value_of(record, "val/acc1_float") == 50.0 != record.best.metrics["val/acc1_float"]
    assert value_of(record, STORAGE_BYTES) == 1234
    assert value_of(record, "val/never") is None
    assert value_of(replace(record, bytes=None, last=None), STORAGE_BYTES) is None


def test_superseding_a_record_changes_only_its_status(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, parse(run()))
    mark_superseded(path)
    record = read_record(path)
    assert (record.status, record.reason) == (
        "interrupted",
        "its trial was given to another worker",
    )
    assert record.tree(("status", "reason")) == parse(run()).tree(("status", "reason"))


# -- other modules do not read the JSON
# --------------------------------------------------------------------------------
KEYS = {
    f.name
    for kind in vars(records).values()
    if is_dataclass(kind)
    for f in fields(kind)
    if f.name != "more"
} | {"schema", "kind"}
# Some keys of a record have other meanings too. A subscript is judged by its object, the
# last name of the expression before the bracket. The names below are never records in
# the package. The test would miss a record with one of these names.
NOT_RECORDS = {
    "hparams": "the arguments of a TQModule",
    "h": "the arguments of a TQModule",
    "values": "arguments of inspect",
    "given": "parsed arguments",
    "content": "a YAML or JSON file of another kind",
    "config": "a configuration",
    "raw": "a sweep file",
    "entry": "an entry of a sweep file",
    "user_attrs": "a trial's attributes in Optuna",
    "checkpoint": "a Lightning checkpoint",
    "row": "a row of a CSV file",
    "rows": "rows of the byte table, by storage scheme",
    "ways": "totals of the byte table, by storage scheme",
    "PAPER": "a table of the paper",
    "made": "facts of a report",
    "marker": "report.json",
}
# These packages may not import `records` (import-linter), and a packed file header shares some
# keys with a record.
PACKAGES_WITHOUT_RECORDS = ("quant/", "models/", "data/", "export/", "cli/classify.py")
HEADER_KEYS = {
    "name",
    "kind",
    "shape",
    "model",
    "layers",
    "norms",
    "widths",
    "bits",
    "ste",
    "float",
}
NAMES_OF_RECORDS = {
    *("record", "records", "run", "runs", "earlier", "best", "last", "test", "tests", "metrics"),
    *("energy", "mechanism", "policy", "way", "inspects", "result", "tree"),
}


def last_name(node):
    """Return `record` for `record`, `self.record`, `self.record()` and `self.record[0]`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def record_keys(source, keys=KEYS):
    """Find (line, expression, key) where a record key is a subscript or is passed to get or pop."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr not in ("get", "pop", "setdefault"):
                continue
            owner, key = node.func.value, node.args[0]
        else:
            continue
        if not isinstance(key, ast.Constant) or key.value not in keys:
            continue
        names = {last_name(owner)}
        # config["model"]["name"] and config.get("model").get("name") are taken from a configuration
        while isinstance(owner, ast.Subscript | ast.Call | ast.Attribute):
            is_get = isinstance(owner, ast.Attribute) and owner.attr in ("get", "pop", "setdefault")
            if isinstance(owner, ast.Attribute) and not is_get:
                break
            owner = owner.func if isinstance(owner, ast.Call) else owner.value
            names.add(last_name(owner))
        if not names & set(NOT_RECORDS):
            yield node.lineno, ast.unparse(node), key.value


FILES = [p for p in sorted((ROOT / "tq_lightning").rglob("*.py")) if p.parent.name != "records"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "tq_lightning")))
def test_record_keys_are_used_only_in_records(path):
    restricted = (
        path.relative_to(ROOT / "tq_lightning").as_posix().startswith(PACKAGES_WITHOUT_RECORDS)
    )
    assert list(record_keys(path.read_text(), KEYS - HEADER_KEYS if restricted else KEYS)) == []


@pytest.mark.parametrize(
    "source",
    [
        'record["status"]',
        'run["widths"]',
        'blocks.get("best")',
        'run.record["test"]["metrics"]',
        '(record.get("bytes") or {}).get("planes")',
        'json.loads(path.read_text())["id"]',
        'record.setdefault("widths", {})',
        'self._record["config"]["model"]',
        'arm.runs[0].record["bytes"]',
        'del record["reason"]',
        'run.record.get("config", {}).get("model")',
    ],
)
def test_record_keys_elsewhere_are_found(source):
    assert list(record_keys(source))


def test_checked_keys_exist_in_the_schema():
    assert {"status", "widths", "best", "planes", "disagree", "by_width", "accounting"} <= KEYS
    assert not set(NOT_RECORDS) & NAMES_OF_RECORDS
    assert not HEADER_KEYS & {"status", "best", "last", "test", "metrics", "bytes", "config", "id"}
    assert isinstance(parse(run()), Record)
