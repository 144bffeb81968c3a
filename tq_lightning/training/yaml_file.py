"""Read YAML files that users write: configurations of `fit` and sweep files.

PyYAML keeps the last of two equal keys, expands aliases without limit and does not name the file in
its errors. No path or environment variable can hold a NUL character. This module raises a one-line
`UserError` with the file and the line for duplicate keys, NUL characters, files that are too large,
and syntax errors.
"""

from pathlib import Path
from typing import Any

import yaml

from tq_lightning.errors import UserError, message_of

MAX_BYTES = 512 * 1024
MAX_VALUES = 100_000  # keys and values, with every alias expanded
MAX_DEPTH = 50


def read_yaml(path: str | Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Read one YAML document from a file in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        path: the file.
        loader: a subclass of `yaml.SafeLoader`, which decides how scalars are typed.

    Returns:
        The document: mappings, lists and scalars; None for an empty file.

    Raises:
        UserError: the file can't be read, is not valid YAML, has a duplicate key or a NUL
            character, or exceeds MAX_BYTES, MAX_VALUES or MAX_DEPTH.
    """
    return parse_yaml(read_text(path), str(path), loader)


def read_text(path: str | Path) -> str:
    """Read a text file of at most MAX_BYTES in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        UserError: the file can't be read, is larger, or is in another encoding.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a folder, or a pipe, which could block forever
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; pass a YAML file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES // 1024} KiB; pass a YAML file")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not UTF-{encoding[4:].removesuffix('-sig')} text "
            f"(byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from None


def parse_yaml(text: str, source: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Parse one YAML document; `source` is named in errors. See `read_yaml`."""
    parser = None
    try:
        parser = loader(text)
        node = parser.get_single_node()
        if node is None:
            return None
        _check(node, source, {})
        return parser.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = message_of(error.problem or error.context)
        raise UserError(f"{source}{line}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        number = text[: error.position].count("\n") + 1
        raise UserError(
            f"{source}, line {number}: not valid YAML: character {chr(error.character)!a}"
        ) from None
    except RecursionError:
        raise UserError(f"{source}: nested deeper than {MAX_DEPTH} levels") from None
    except (ValueError, TypeError, OverflowError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: not valid YAML: {message_of(error)}") from None
    finally:
        if parser is not None:
            parser.dispose()


def _check(
    node: yaml.Node, source: str, known: dict[int, tuple[int, int] | None]
) -> tuple[int, int]:
    """Check a node and everything below it.

    Args:
        node: composed, not yet constructed.
        source: name of the file, for errors.
        known: id of a node -> return value for it; None while the node is being checked, which
            detects an alias inside its own anchor.

    Returns:
        Number of values, with aliases expanded, and depth.
    """
    where = f"{source}, line {node.start_mark.line + 1}"
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise UserError(f"{where}: an anchor contains its own alias")
        return size
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
        raise UserError(f"{where}: {node.value!r} has a NUL character; remove it")
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_duplicates(node, source)
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    sizes = [_check(part, source, known) for part in below]
    values = 1 + sum(size[0] for size in sizes)
    depth = 1 + max((size[1] for size in sizes), default=0)
    if values > MAX_VALUES:
        raise UserError(f"{where}: more than {MAX_VALUES:,} values (aliases count in full)")
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    known[id(node)] = values, depth
    return values, depth


def _check_duplicates(node: yaml.MappingNode, source: str) -> None:
    """Raise UserError for a duplicate key of a mapping; `<<` may be repeated."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        line = key.start_mark.line + 1
        if (key.tag, key.value) in lines:
            first = lines[key.tag, key.value]
            raise UserError(
                f"{source}, line {line}: duplicate key {key.value} (first on line {first})"
            )
        lines[key.tag, key.value] = line
