"""Values of YAML text, typed once: how configurations and values of the command line are read.

A quoted value stays a string, so that `'8e12345'` is a name and `"null"` is not null. A plain
`1e-3` is a number, as in YAML 1.2. jsonargparse would convert strings a second time, except
instances of `Text`.
"""

import re
from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import register_type

from tq_lightning.errors import UserError
from tq_lightning.training.yaml_file import parse_yaml

_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class Text(str):
    """A string of a YAML file, which jsonargparse must not convert to another type."""


def _type_floats_as_yaml_1_2(cls: Any) -> None:
    """Replace the implicit resolvers of a PyYAML class: no dates, and 1e-3 is a number."""
    dropped = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag not in dropped]
        for first, rows in cls.yaml_implicit_resolvers.items()
    }
    cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class Loader(yaml.SafeLoader):
    """Safe YAML loader whose text values are `Text`."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys are plain strings."""
        mapping = super().construct_mapping(node, deep)
        return {str(k) if isinstance(k, Text) else k: v for k, v in mapping.items()}


class _Dumper(yaml.SafeDumper):
    """Safe YAML dumper that quotes strings which `Loader` would read as another type."""


_type_floats_as_yaml_1_2(Loader)
_type_floats_as_yaml_1_2(_Dumper)
Loader.add_constructor("tag:yaml.org,2002:str", lambda loader, node: Text(node.value))
for _dumper in (_Dumper, yaml.SafeDumper):
    _dumper.add_representer(Text, yaml.SafeDumper.represent_str)


def dump(value: Any, flow: bool = False) -> str:
    """Write a configuration as YAML that `Loader` reads back to the same values.

    Args:
        value: mappings, lists and scalars.
        flow: write {key: value} instead of one line for each key.
    """
    return yaml.dump(
        value, Dumper=_Dumper, default_flow_style=flow, allow_unicode=True, sort_keys=False
    )


def load(text: str, path: str = "") -> Any:
    """Parse a value of the command line, or the content of the configuration file `path`.

    Raises:
        UserError: a configuration, a mapping or a list that is not valid YAML.
        yaml.YAMLError: other text that is not valid YAML; jsonargparse then uses it as a string.
    """
    if not path and text.strip() == "None":
        return None
    try:
        value = parse_yaml(text, str(path) or "the value", Loader)
    except UserError as error:
        if path or text.lstrip()[:1] == "{":
            raise
        raise yaml.YAMLError(str(error)) from None
    # jsonargparse dumps the `init_args` of a class and loads them again, with a newline at the end
    mapping = text.lstrip().startswith("{") or text.endswith("\n")
    if not path and isinstance(value, dict) and not mapping:
        return text  # a value such as "C:" or "a: b" is text
    return value


def as_plain_strings(value: Any) -> Any:
    """Return a copy of a configuration with `str` instead of `Text`, for checkpoints."""
    if isinstance(value, Namespace):
        copy = value.clone()
        for key, item in vars(copy).items():
            setattr(copy, key, as_plain_strings(item))
        return copy
    if isinstance(value, dict):
        return {key: as_plain_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_plain_strings(item) for item in value]
    return str(value) if isinstance(value, Text) else value


register_type(Text, serializer=Text, deserializer=Text)  # `dump` writes it as a string
