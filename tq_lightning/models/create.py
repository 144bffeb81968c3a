"""create_model(): a model by name, with actionable errors, and weights from a file."""

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
from tq_lightning.errors import UserError, message_of
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
        name: a name from `timm.list_models()`, with an optional tag; `hf-hub:...` or
            `local-dir:...`; or `package.module:factory`, a function that returns the network.
        num_classes: outputs of the classifier; None for the default of the model.
        pretrained: load timm's pretrained weights, from the cache or over the network.
        checkpoint_path: weights to load: a `.safetensors` file or one written by `torch.save` (read
            with `weights_only=True`) with a plain state dict, a checkpoint of timm, or a checkpoint
            of a run. Names and shapes must match.
        **kwargs: further arguments of the model, e.g. `in_chans=1`.

    Returns:
        The model in training mode, on the CPU or the device of an enclosing `torch.device(...)`.

    Raises:
        UserError: the name, an argument or the tag is unknown, or the weights cannot be downloaded,
            read or loaded into the model.
    """
    check_name(name)
    if checkpoint_path is not None:
        check_file(checkpoint_path)
    if is_factory(name):
        model = _create_from_factory(name, num_classes, pretrained, kwargs)
        if checkpoint_path is not None:
            load_weights(model, checkpoint_path, name)
        return model
    try:
        with _offline_without_network() if pretrained or is_remote(name) else nullcontext():
            model = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, **kwargs
            )
    except Exception as error:  # the model and the network stack raise errors of any type
        reason = f"{type(error).__name__}: {message_of(error, 160)}"
        if pretrained:
            reason = (
                f"{type(error).__name__}: not in the cache, and no network"
                if isinstance(error, OSError)
                else reason
            )
            hint = "pass pretrained=false, or checkpoint_path=FILE with local weights"
            raise UserError(
                f"cannot load the pretrained weights of {name} ({reason}); {hint}"
            ) from error
        passed = {"num_classes": num_classes, **kwargs}
        given = ", ".join(f"{key}={value!r}" for key, value in passed.items() if value is not None)
        raise UserError(
            f"timm cannot create {name} with {given or 'no arguments'} ({reason})"
        ) from error
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path, name)
    return model


def check_name(name: str) -> None:
    """Raise UserError for an unknown model name; the message suggests similar names."""
    if is_remote(name) or is_factory(name) or timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
    raise UserError(f"unknown model {name!r}; {hint}")


def check_arguments(arguments: Any) -> None:
    """Check `model.model_args`, the further arguments of a model.

    Raises:
        UserError: not a mapping of names, or an argument that has a key of its own.
    """
    if not isinstance(arguments or {}, dict) or not all(
        isinstance(k, str) for k in arguments or {}
    ):
        raise UserError(
            f"model.model_args: got {arguments!r}, pass a mapping of names, e.g. {{in_chans: 1}}"
        )
    for key in ("name", "num_classes", "pretrained", "checkpoint_path"):
        if key in (arguments or {}):
            raise UserError(f"model.model_args: got {key}={arguments[key]}; pass model.{key}")


def _create_from_factory(
    name: str, num_classes: int | None, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    if pretrained:
        raise UserError(
            f"model.pretrained needs a timm model, and {name} is a factory; pass "
            "checkpoint_path=FILE, or load the weights in the factory"
        )
    classes = {} if num_classes is None else {"num_classes": num_classes}
    model = call_factory(name, "model.name", **classes, **kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name={name}: the factory returned a {type(model).__name__}; return an nn.Module"
        )
    return model


def is_remote(name: str) -> bool:
    """Return True if a model name refers to a hub or a folder, such as `hf-hub:...`."""
    return ":" in name and not is_factory(name)


def check_local(name: str, path: str | Path) -> None:
    """Check that a model name from a file is not remote, so that loading it downloads nothing.

    Args:
        name: name of the model.
        path: the file, for the message.

    Raises:
        UserError: the name is remote.
    """
    if not isinstance(name, str) or is_remote(name):
        raise UserError(
            f"{path} names the model {name!r}, which would have to be downloaded; "
            "pass a checkpoint of a timm model"
        )


@contextmanager
def _offline_without_network() -> Iterator[None]:
    """Set the Hugging Face Hub client to offline mode if there is no network.

    Otherwise it would retry for most of a minute before it reads its cache. The test for a network
    is that the host of the hub has an address. It is skipped behind a proxy, which resolves
    addresses itself.
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
