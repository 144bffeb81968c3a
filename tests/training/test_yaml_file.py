"""User-written YAML: one-line errors for encodings, duplicate keys, syntax and alias bombs."""

import os

import pytest

from tq_lightning.errors import UserError
from tq_lightning.training.yaml_file import read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_byte_order_mark_are_read(tmp_path, encoding):
    path = tmp_path / "a.yaml"
    path.write_bytes("a: {b: [1, für]}\n".encode(encoding))
    assert read_yaml(path) == {"a": {"b": [1, "für"]}}


def test_empty_file_is_none_and_merge_keys_are_supported(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) is None
    path.write_text("base: &b {x: 1, y: 2}\nc: {<<: *b, y: 3}\n")
    assert read_yaml(path)["c"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\n# f\xfcr\nb: 2\n", "line 2: not UTF-8 text (byte 0xfc)"),
        ("a: \u00fc".encode("utf-16-le"), "line 1: not UTF-8 text (byte 0xfc)"),
        (b"a: \x00", "not valid YAML"),
        (b'a: 1\nb: ["x\\0y"]\n', r"line 2: 'x\x00y' has a NUL character; remove it"),
        (b"a: 1\nb: [1, 2\nc: 3\n", "line 3: not valid YAML: "),
        (b"a: {b: 1}}\n", "line 1: not valid YAML: "),
        (b"a: 1\n b: 2\n", "line 2: not valid YAML: "),
        (b"a: 'x\n", "not valid YAML: "),
        (b"\ta: 1", "line 1: not valid YAML: "),
        (b"a: 1\n---\nb: 2\n", "not valid YAML: "),
        (b"a: !!python/object/apply:os.system [ls]\n", "line 1: not valid YAML: "),
        (b"a: *b\n", "line 1: not valid YAML: "),
        (b"a: 2024-13-45\n", "not valid YAML: "),
        (b"a: " + b"9" * 5000, "not valid YAML: "),
        (b"? [a]\n: 1\n", "not valid YAML: "),
        (b"m:\n  lr: 1\n  x: 2\n  lr: 3\n", "line 4: duplicate key lr (first on line 2)"),
        (b"{lr: 1, 'lr': 2}", "line 1: duplicate key lr"),
        (b"a: &a [*a]\n", "an anchor contains its own alias"),
        (BOMB.encode(), "more than 100,000 values"),
        (MERGES.encode(), "more than 100,000 values"),
        (CHAIN.encode(), "nested deeper than 50 levels"),
        (b"[" * 5000 + b"]" * 5000, "nested deeper than 50 levels"),
        (b"#" * 600 * 1024, "larger than 512 KiB"),
    ],
)
def test_error_is_one_line_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_missing_file_and_folder_are_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("none", "does not exist"),
        ("", "is not a file"),
        ("pipe", "is not a file"),
    ):
        with pytest.raises(UserError, match=message):
            read_yaml(tmp_path / name)
