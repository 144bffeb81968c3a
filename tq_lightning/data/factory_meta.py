"""Data modules from a user's factory: `data.name: package.module:factory`."""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning

from tq_lightning.data.batch_reader import default_workers
from tq_lightning.data.dataset_module import DatasetModule
from tq_lightning.data.sampling import run_seed
from tq_lightning.data.validation import check_data_options, check_unused, check_val_fraction
from tq_lightning.errors import UserError
from tq_lightning.factories import call_factory, is_factory

STAGES = ("train", "val", "test")
# keys of the `data:` section that a factory's data module uses, or that only say where data is
_USED_BY_MODULES = ("name", "data_args", "root", "download")
_SAMPLING = ("batch_size", "eval_batch_size", "workers", "val_fraction", "samples", "seed")


def open_custom(
    name: str, arguments: Mapping[str, Any] | None, **options: Any
) -> lightning.LightningDataModule:
    """Call a factory of data sets.

    Args:
        name: `package.module:function`.
        arguments: its arguments.
        **options: the other arguments of `DatasetModule`.

    Returns:
        The LightningDataModule that the factory returns, or a `DatasetModule` of its data sets.

    Raises:
        UserError: see `call_factory`; an argument without a name; or the factory returns another
            type.
    """
    if not all(isinstance(key, str) for key in arguments or {}):
        raise UserError(f"data.data_args: got {arguments}, pass a mapping of names, e.g. {{n: 1}}")
    made = call_factory(name, "data.name", **(arguments or {}))
    if isinstance(made, lightning.LightningDataModule):
        return made
    parts = list(made) if isinstance(made, tuple | list) and 2 <= len(made) <= 3 else []
    if not parts or parts[0] is None or not all(p is None or _is_dataset(p) for p in parts):
        raise UserError(
            f"data.name={name}: it returns {_kind(made)}; return a LightningDataModule, "
            "or (train, test) or (train, val, test) data sets with __len__ and __getitem__"
        )
    named = dict(zip(("train", "test") if len(parts) == 2 else STAGES, parts, strict=True))
    given = {stage: part for stage, part in named.items() if part is not None}
    for stage, part in given.items():
        if not len(part):
            raise UserError(f"data.name={name}: its {stage} data set is empty; return samples")
    return DatasetModule(name, given, **options)


def _kind(made: Any) -> str:
    """Return the type of a value, with those of its items if it is a tuple or a list."""
    items = (
        ", ".join(type(item).__name__ for item in made) if isinstance(made, tuple | list) else ""
    )
    return f"a {type(made).__name__}" + (f" of {items[:80]}" if items else "")


def _is_dataset(part: Any) -> bool:
    indexed = hasattr(part, "__getitem__") and hasattr(part, "__len__")
    return indexed and not isinstance(part, str)


class FactoryMeta(type):
    """Make `TQDataModule(name=...)` return the data module of a factory, if `name` is one.

    A metaclass is needed because the signature of `__init__` is the `data:` section.
    """

    @property
    def __signature__(cls) -> inspect.Signature:
        """Signature of `__init__` without self, which `__call__` would hide."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(cls, *args: Any, **keys: Any) -> Any:
        """Construct the data module, or call the factory."""
        given = inspect.signature(cls.__init__).bind(None, *args, **keys)  # type: ignore[misc]
        given.apply_defaults()
        values = given.arguments
        if not is_factory(values["name"]):
            return super().__call__(*args, **keys)
        check_data_options(values)
        hint = ", or pass it to the factory as one of data.data_args"
        unused = [key for key in values if key not in ("self", *_USED_BY_MODULES)]
        images = [key for key in unused if key not in _SAMPLING]
        check_unused(values, cls.__signature__, images, hint)
        workers, seed = values["workers"], values["seed"]
        data = open_custom(
            values["name"],
            values["data_args"],
            batch_size=values["batch_size"],
            eval_batch_size=values["eval_batch_size"],
            workers=default_workers() if workers is None else workers,
            val_fraction=values["val_fraction"],
            samples=values["samples"],
            seed=run_seed() if seed is None else seed,
        )
        if not isinstance(data, DatasetModule):
            check_unused(values, cls.__signature__, unused, hint)
        elif "val" in data.parts:
            check_val_fraction(data.name, data.val_fraction, cls.__signature__)
        return data
