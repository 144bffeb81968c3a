"""Load float weights from a checkpoint file, without running code from it."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError, message_of
from tq_lightning.models.checkpoint_checksum import verify_checkpoint
from tq_lightning.quant.switchable_norm import FLOAT

# Keys under which a checkpoint may store its tensors, averaged weights first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# Prefixes of all tensor names: DataParallel and AveragedModel, our LightningModule.
_PREFIXES = ("module.", "model.")

# Parts anywhere in a tensor name: torch.compile, FSDP, activation checkpointing.
_INFIXES = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Tensors that only a prepared model has: per-width norms, calibration flags, learned clips.
_ONLY_PREPARED = re.compile(r"\.sets\.\d+\.|\.calibrated$|\.clip$")

# Counters without influence on outputs: of AveragedModel, and of batch norms since PyTorch 0.4.1.
_COUNTERS = ("n_averaged", "num_batches_tracked")


def load_weights(model: nn.Module, path: str | Path, name: str = "the model") -> None:
    """Load a checkpoint file into an unprepared model, in place. All names and shapes must match.

    Args:
        model: the model.
        path: a `.safetensors` file, or one written by `torch.save`.
        name: name of the model, for messages.

    Raises:
        UserError: the file does not exist, is not a file of tensors, or its tensors do not fit the
            model; the message names the first ones, with both shapes.
    """
    state = _rename(read_state_dict(path), model)
    check_fit(state, model, path, name)
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor whose values cannot be copied, such as a sparse one
        reason = message_of(error, 160)
        raise UserError(f"{path} does not fit {name} ({reason})") from error


def check_fit(
    state: Mapping[str, Any], model: nn.Module, path: str | Path, name: str = "the model"
) -> None:
    """Check that a state dict has the names and shapes of a model.

    Counters without influence on outputs may be missing or unknown.

    Args:
        state: the state dict.
        model: the model.
        path: file of the state dict, for messages.
        name: name of the model, for messages.

    Raises:
        UserError: the state dict does not fit; the message names the first tensors, with both
            shapes.
    """
    own = model.state_dict()
    for key in sorted(state.keys() & own.keys()):
        if not isinstance(state[key], Tensor):
            kind = type(state[key]).__name__
            raise UserError(f"{path}: {key} is not a tensor, got {kind}; pass an intact file")
        if state[key].shape != own[key].shape:
            got, expected = tuple(state[key].shape), tuple(own[key].shape)
            raise UserError(
                f"{path}: {key} has shape {got}, {name} has {expected}; "
                f"{_mismatch_hint(key, got, expected, model)}"
            )
    missing = sorted(key for key in own.keys() - state.keys() if not key.endswith(_COUNTERS))
    extra = sorted(key for key in state.keys() - own.keys() if not key.endswith(_COUNTERS))
    if missing or extra:
        lists = {"missing": missing, "unknown": extra}
        words = [
            f"{len(keys)} {what} ({', '.join(keys[:2])}, ...)"
            for what, keys in lists.items()
            if keys
        ]
        raise UserError(
            f"{path} does not fit {name}: tensors {', '.join(words)}; "
            "pass the checkpoint of this model"
        )


def check_file(path: str | Path) -> None:
    """Raise UserError if `path` is not a file."""
    if not Path(path).is_file():
        raise UserError(
            f"no checkpoint at {path}; pass the path of a .safetensors, .pth, .th or .ckpt file"
        )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint file, on the CPU.

    Raises:
        UserError: the file does not exist, is damaged, or contains more than tensors and plain
            values.
    """
    check_file(path)
    if Path(path).suffix != ".safetensors":
        verify_checkpoint(path)
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = load_torch_file(path)
    except Exception as error:
        raise UserError(
            f"cannot read {path} as a checkpoint ({why_not_loaded(error)}); "
            "pass an intact file of tensors"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise UserError(
            f"{path} has no state dict "
            f"(a dict of tensors, plain or under one of {', '.join(_WRAPPERS)})"
        )
    return content


def load_torch_file(path: str | Path, mmap: bool = False) -> Any:
    """Load a file of `torch.save` on the CPU, without running code from it and without warnings.

    Args:
        path: the file.
        mmap: map the tensors instead of reading them.

    Raises:
        Exception: see `torch.load` and `why_not_loaded`.
    """
    with open(path, "rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # torch would parse a text as a pickle
            raise ValueError("not a zip archive and not a pickle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles and TorchScript archives, which are errors
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def why_not_loaded(error: Exception) -> str:
    """Return the reason why a file was not loaded, without torch's advice to disable safety."""
    text = message_of(error)
    if "TorchScript" in text:
        return "it is a TorchScript archive"
    if isinstance(error, pickle.UnpicklingError):
        code = "GLOBAL " in text or "Unsupported" in text
        return "it contains objects that could run code" if code else "it is damaged"
    marks = ("mmap", "zip", "PytorchStreamReader", "weights_only")
    if isinstance(error, EOFError | UnicodeDecodeError) or any(mark in text for mark in marks):
        return "not a file that torch.save wrote, or an incomplete one"
    if isinstance(error, KeyError):
        return f"it has no {text}"
    return f"{type(error).__name__}: {text[:120]}"


def _rename(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename tensors as in `model`: strip wrappers and prepare(), map `linear` to `fc`."""
    own = model.state_dict().keys()
    state = _unwrapped(state, set(own))
    state = {
        _unprepared(key): value
        for key, value in state.items()
        if key in own or not _ONLY_PREPARED.search(key)
    }
    if hasattr(model, "fc") and not hasattr(model, "linear"):  # name in the public CIFAR weights
        state = {
            f"fc.{key[7:]}" if key.startswith("linear.") else key: value
            for key, value in state.items()
        }
    return state


def _unwrapped(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Strip the prefixes of training wrappers, in any order and number."""
    state = {key if key in own else _INFIXES.sub("", key): v for key, v in state.items()}
    while not state.keys() & own:
        named = [key for key in state if key not in _COUNTERS]
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in named)), None)
        if prefix is None or not named:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _unprepared(key: str) -> str:
    """Return the name that a float weight, or a tensor of a float norm, had before prepare()."""
    return (
        key.replace(f".sets.{FLOAT}.", ".")
        .replace(".parametrizations.", ".")
        .removesuffix(".original")
    )


def _mismatch_hint(
    key: str, got: tuple[int, ...], expected: tuple[int, ...], model: nn.Module
) -> str:
    cfg = getattr(model, "pretrained_cfg", {}) or {}
    if key.startswith(f"{cfg.get('classifier')}.") and got:
        return f"pass num_classes={got[0]}"
    stem = f"{cfg.get('first_conv')}.weight"
    if key == stem and len(got) == len(expected) and got[1] != expected[1]:
        return f"pass in_chans={got[1]}"
    return "pass the checkpoint of this model"
