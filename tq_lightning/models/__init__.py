"""Models by name: `timm.create_model` with actionable errors, and weights from files.

Importing this package registers the CIFAR ResNets of `models/cifar_resnet.py` with timm.
"""

from tq_lightning.models.create import (
    check_arguments,
    check_local,
    check_name,
    create_model,
    is_remote,
)

__all__ = ["check_arguments", "check_local", "check_name", "create_model", "is_remote"]
