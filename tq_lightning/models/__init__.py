"""Models by name: `timm.create_model` with errors a user can act on, and weights from files that run no code.

The CIFAR ResNets of `models/cifar_resnet.py` are known to timm once this module is imported.
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
from tq_lightning.models.weights import load_weights


def create_model(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Any model of timm, or one of our CIFAR ResNets, by name.

    Args:
        name: a name of `timm.list_models()`, with its tag if need be, or `hf-hub:...` / `local-dir:...`.
        num_classes: outputs of the classifier; None for the model's own number.
        pretrained: loads timm's weights for the model (from its cache, else over the network).
        checkpoint_path: weights to load, `.safetensors` or a `torch.save` file (read with `weights_only=True`): a plain
            state dict, a checkpoint of timm, or one of our own runs. Names and shapes must match.
        **kwargs: passed on to the model, `in_chans=1` for one.

    Returns:
        The model, in training mode, on the CPU (or on the device of an enclosing `torch.device(...)`).

    Raises:
        UserError: unknown name, argument or tag; weights that cannot be had, read, or loaded into the model.
    """
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
        hint = (
            f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
        )
        raise UserError(f"unknown model {name!r}; {hint}")
    try:
        with _hub_answers_at_once() if pretrained or ":" in name else nullcontext():
            model = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, **kwargs
            )
    except Exception as error:  # timm raises whatever the model or the network stack does
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if pretrained:
            said = (
                f"{type(error).__name__}: not in the cache, and no network"
                if isinstance(error, OSError)
                else said
            )
            hint = "pass pretrained=false, or checkpoint_path=FILE with weights you have"
            raise UserError(
                f"cannot get the pretrained weights of {name} ({said}); {hint}"
            ) from error
        asked = {"num_classes": num_classes, **kwargs}
        given = ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)
        raise UserError(
            f"timm cannot make {name} with {given or 'no arguments'} ({said})"
        ) from error
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path, name)
    return model


@contextmanager
def _hub_answers_at_once() -> Iterator[None]:
    """Without a network the hub's client retries for most of a minute; here it looks in its cache alone, and says so.

    Judged by whether the hub's host has an address; behind a proxy, which knows addresses itself, nothing is changed.
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
