"""Class names of a packed file."""

from collections.abc import Mapping
from typing import Any


def class_names(header: Mapping[str, Any]) -> list[str]:
    """Return the class names of a packed file, or those of ImageNet for 1000 classes.

    Args:
        header: header of a packed file, or `tq_file` of a loaded model.

    Returns:
        Names in the order of the classes, empty if they are unknown.
    """
    if header["class_names"]:
        return list(header["class_names"])
    if header["model"].get("num_classes") == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(1000)]
    return []
