"""Models by name: `timm.create_model` with actionable errors, and weights from files.

Importing this package registers the CIFAR ResNets of `models/cifar_resnet.py` with timm.
"""

import difflib
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import timm
from huggingface_hub import constants as hub
from torch import nn

import tq_lightning.models.cifar_resnet  # noqa: F401  registers its models with timm
from tq_lightning.errors import UserError
from tq_lightning.factories import call_factory, is_factory
from tq_lightning.models.weights import check_file, load_weights


def create_model(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm model, or one of our CIFAR ResNets, by name.

    Args:
        name: A name from `timm.list_models()`, with a tag if needed, or `hf-hub:...` or
            `local-dir:...`; or `package.module:factory`, a function that returns the network.
        num_classes: Outputs of the classifier; None for the model's own number.
        pretrained: Load timm's weights for the model (from its cache, else over the network).
        checkpoint_path: Weights to load: a `.safetensors` file or one written by `torch.save` (read
            with `weights_only=True`) with a plain state dict, a checkpoint of timm, or a checkpoint
            of a run. Names and shapes must match.
        **kwargs: Further arguments of the model, e.g. `in_chans=1`.

    Returns:
        The model, in training mode, on the CPU (or on the device of an enclosing
        `torch.device(...)`).

    Raises:
        UserError: An unknown name, argument or tag, or weights that cannot be downloaded, read or
            loaded into the model.
    """
    check_name(name)
    if checkpoint_path is not None:
        check_file(checkpoint_path)
    if is_factory(name):
        model = _own_model(name, num_classes, pretrained, kwargs)
        if checkpoint_path is not None:
            load_weights(model, checkpoint_path, name)
        return model
    try:
        with _offline_without_network() if pretrained or is_remote(name) else nullcontext():
            model = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, **kwargs
            )
    except Exception as error:  # the model and the network stack raise errors of any type
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if pretrained:
            said = (
                f"{type(error).__name__}: not in the cache, and no network"
                if isinstance(error, OSError)
                else said
            )
            hint = "pass pretrained=false, or checkpoint_path=FILE with weights you have"
            raise UserError(
                f"cannot load the pretrained weights of {name} ({said}); {hint}"
            ) from error
        asked = {"num_classes": num_classes, **kwargs}
        given = ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)
        raise UserError(
            f"timm cannot create {name} with {given or 'no arguments'} ({said})"
        ) from error
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path, name)
    return model


def check_name(name: str) -> None:
    """Raise UserError for the name of a model that timm does not know, with similar names."""
    if is_remote(name) or is_factory(name) or timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
    raise UserError(f"unknown model {name!r}; {hint}")


def _own_model(
    name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    if pretrained:
        raise UserError(
            f"model.pretrained is for models of timm, and {name} is a factory; pass "
            "checkpoint_path=FILE, or load the weights in the factory"
        )
    classes = {} if num_classes is None else {"num_classes": num_classes}
    model = call_factory(name, "model.name", **classes, **kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name={name}: it returns a {type(model).__name__}; return an nn.Module"
        )
    return model


def is_remote(name: str) -> bool:
    """Tell whether a model name refers to a hub or a folder, such as `hf-hub:...`, not to timm."""
    return ":" in name and not is_factory(name)


def check_local(name: str, path: str | Path) -> None:
    """Refuse a remote model name that was read from a file: nothing is fetched on a file's behalf.

    Args:
        name: Name of the model.
        path: The file, for the message.

    Raises:
        UserError: The name is remote.
    """
    if not isinstance(name, str) or is_remote(name):
        raise UserError(
            f"{path} names the model {name!r}, which would be fetched from elsewhere; "
            "pass a checkpoint that names a timm model"
        )


@contextmanager
def _offline_without_network() -> Iterator[None]:
    """Put the hub's client into offline mode if there is no network.

    It would otherwise retry for most of a minute before it reads its cache. There is a network if
    the hub's host has an address. Behind a proxy, which resolves addresses itself, nothing changes.
    """
    before = hub.HF_HUB_OFFLINE
    if not getproxies():
        try:
            socket.getaddrinfo(urlparse(hub.ENDPOINT).hostname, 443)
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
