"""Preprocessing, class names and inputs, which checkpoints store for deployment."""

import sys
from itertools import zip_longest
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only


def preprocessing_of(data: Any) -> dict[str, Any] | None:
    """Return the evaluation preprocessing and the class names of the data, in plain types.

    Args:
        data: the TQDataModule, another data module, or None.

    Returns:
        The preprocessing of images with their `classes`; of other data only `classes`, or None if
        its classes have no names.
    """
    if not hasattr(data, "mean"):
        names = [str(name) for name in getattr(data, "class_names", None) or ()]
        named = names != [str(index) for index in range(len(names))]
        return {"classes": names} if named else None
    return {
        "input_size": list(data.input_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
        "classes": list(data.class_names),
    }


def export_fields(data: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a checkpoint stores for `export`: preprocessing, or the inputs of other networks.

    Args:
        data: the data module, or None.
        inputs: rows of `quant.input_spec.describe_inputs`, [] before the first step.
    """
    preprocessing = preprocessing_of(data)
    fields: dict[str, Any] = {} if preprocessing is None else {"preprocessing": preprocessing}
    if inputs and "mean" not in (preprocessing or {}):
        fields["inputs"] = inputs
    return fields


@rank_zero_only
def report_other_classes(checkpoint: dict[str, Any], data: Any) -> None:
    """Print one line if the class folders of the data differ from those of the checkpoint.

    Class indices follow the order of the names, so the accuracy would be meaningless.

    Args:
        checkpoint: a checkpoint of a fit, which stores its class names.
        data: the TQDataModule, or None. Data sets with fixed classes are not compared.
    """
    names = (checkpoint.get("preprocessing") or {}).get("classes")
    if not names or getattr(data, "name", None) != "imagefolder" or names == data.class_names:
        return
    number, (ours, theirs) = next(
        (n, pair)
        for n, pair in enumerate(zip_longest(names, data.class_names, fillvalue="none"))
        if pair[0] != pair[1]
    )
    print(
        f"the checkpoint was trained on other classes: class {number} is {ours!a} there and "
        f"{theirs!a} in the data",
        file=sys.stderr,
        flush=True,
    )
