"""Models by name: `timm.create_model` with errors a user can act on, and weights from files that run no code.

The CIFAR ResNets of `tq_lightning.cifar` are known to timm once this module is imported.
"""

import difflib
import pickle
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import timm
import torch
from huggingface_hub import constants as hub
from torch import Tensor, nn

import tq_lightning.cifar  # noqa: F401  registers its models with timm
from tq_lightning.errors import UserError
from tq_lightning.quant.norm import FLOAT

# What a checkpoint may wrap its tensors in, the averaged weights first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What training wrappers put before every name: DataParallel, our LightningModule, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# What only a prepared model holds: the norm sets of the widths, which of them are calibrated, learned clips.
_ONLY_PREPARED = re.compile(r"\.sets\.\d+\.|\.calibrated$|\.clip$")


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
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names"
        raise UserError(f"unknown model {name!r}; {hint}")
    try:
        with _hub_answers_at_once() if pretrained or ":" in name else nullcontext():
            model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except Exception as error:  # timm raises whatever the model or the network stack does
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if pretrained:
            said = f"{type(error).__name__}: not in the cache, and no network" if isinstance(error, OSError) else said
            hint = "pass pretrained=false, or checkpoint_path=FILE with weights you have"
            raise UserError(f"cannot get the pretrained weights of {name} ({said}); {hint}") from error
        asked = {"num_classes": num_classes, **kwargs}
        given = ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)
        raise UserError(f"timm cannot make {name} with {given or 'no arguments'} ({said})") from error
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


def load_weights(model: nn.Module, path: str | Path, name: str = "the model") -> None:
    """Loads a checkpoint file into an unprepared model, in place; all names and shapes must match.

    Raises:
        UserError: no such file, not a file of tensors, or tensors that do not fit (said: which, with both shapes).
    """
    state = _rename(read_state_dict(path), model)
    own = model.state_dict()
    for key in sorted(state.keys() & own.keys()):
        if state[key].shape != own[key].shape:
            got, want = tuple(state[key].shape), tuple(own[key].shape)
            raise UserError(f"{path}: {key} is {got}, {name} has {want}; {_mismatch_hint(key, got, want, model)}")
    # A counter that older PyTorch did not save, and that moves no output.
    missing = sorted(key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    extra = sorted(state.keys() - own.keys())
    if missing or extra:
        lists = {"missing": missing, "unknown": extra}
        words = [f"{len(keys)} {what} ({', '.join(keys[:2])}, ...)" for what, keys in lists.items() if keys]
        raise UserError(f"{path} does not fit {name}: tensors {', '.join(words)}; pass the checkpoint of this model")
    model.load_state_dict(state, strict=False)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, out of whatever it wraps them in. No file runs code.

    Raises:
        UserError: no such file, or one that holds anything but tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; pass the path of a .safetensors, .pth, .th or .ckpt file")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} refused: no checkpoint, or one that holds more than tensors and plain values") from error
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"cannot read {path} as a checkpoint ({said}); pass a file that torch.save wrote, whole") from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict (a dict of tensors, plain or under one of {', '.join(_WRAPPERS)})")
    return content


def _rename(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names as the model has them: wrapper prefixes off, prepared tensors back to their place, `linear` to our `fc`."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    own = model.state_dict().keys()
    state = {_unprepared(key): value for key, value in state.items() if key in own or not _ONLY_PREPARED.search(key)}
    if hasattr(model, "fc") and not hasattr(model, "linear"):  # the public CIFAR weights say linear
        state = {f"fc.{key[7:]}" if key.startswith("linear.") else key: value for key, value in state.items()}
    return state


def _unprepared(key: str) -> str:
    """The name that a float weight, or a tensor of a float norm set, had before prepare()."""
    return key.replace(f".sets.{FLOAT}.", ".").replace(".parametrizations.", ".").removesuffix(".original")


def _mismatch_hint(key: str, got: tuple[int, ...], want: tuple[int, ...], model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", {}) or {}
    if key.startswith(f"{cfg.get('classifier')}."):
        return f"pass num_classes={got[0]}"
    if key == f"{cfg.get('first_conv')}.weight" and len(got) == len(want) and got[1] != want[1]:
        return f"pass in_chans={got[1]}"
    return "pass the checkpoint of this model"
