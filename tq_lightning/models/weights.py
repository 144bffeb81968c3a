"""TODO models/weights.py."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.quant.switchable_norm import FLOAT

# What a checkpoint may wrap its tensors in, the averaged weights first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


# What training wrappers put before every name: DataParallel, our LightningModule, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")


# What only a prepared model holds: the norm sets of the widths, which of them are calibrated, learned clips.
_ONLY_PREPARED = re.compile(r"\.sets\.\d+\.|\.calibrated$|\.clip$")


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
            raise UserError(
                f"{path}: {key} is {got}, {name} has {want}; {_mismatch_hint(key, got, want, model)}"
            )
    # A counter that older PyTorch did not save, and that moves no output.
    missing = sorted(
        key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")
    )
    extra = sorted(state.keys() - own.keys())
    if missing or extra:
        lists = {"missing": missing, "unknown": extra}
        words = [
            f"{len(keys)} {what} ({', '.join(keys[:2])}, ...)"
            for what, keys in lists.items()
            if keys
        ]
        raise UserError(
            f"{path} does not fit {name}: tensors {', '.join(words)}; pass the checkpoint of this model"
        )
    model.load_state_dict(state, strict=False)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, out of whatever it wraps them in. No file runs code.

    Raises:
        UserError: no such file, or one that holds anything but tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(
            f"no checkpoint at {path}; pass the path of a .safetensors, .pth, .th or .ckpt file"
        )
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} refused: no checkpoint, or one that holds more than tensors and plain values"
        ) from error
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(
            f"cannot read {path} as a checkpoint ({said}); pass a file that torch.save wrote, whole"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise UserError(
            f"{path} holds no state dict (a dict of tensors, plain or under one of {', '.join(_WRAPPERS)})"
        )
    return content


def _rename(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names as the model has them: wrapper prefixes off, prepared tensors back to their place, `linear` to our `fc`."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    own = model.state_dict().keys()
    state = {
        _unprepared(key): value
        for key, value in state.items()
        if key in own or not _ONLY_PREPARED.search(key)
    }
    if hasattr(model, "fc") and not hasattr(model, "linear"):  # the public CIFAR weights say linear
        state = {
            f"fc.{key[7:]}" if key.startswith("linear.") else key: value
            for key, value in state.items()
        }
    return state


def _unprepared(key: str) -> str:
    """The name that a float weight, or a tensor of a float norm set, had before prepare()."""
    return (
        key.replace(f".sets.{FLOAT}.", ".")
        .replace(".parametrizations.", ".")
        .removesuffix(".original")
    )


def _mismatch_hint(key: str, got: tuple[int, ...], want: tuple[int, ...], model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", {}) or {}
    if key.startswith(f"{cfg.get('classifier')}."):
        return f"pass num_classes={got[0]}"
    if key == f"{cfg.get('first_conv')}.weight" and len(got) == len(want) and got[1] != want[1]:
        return f"pass in_chans={got[1]}"
    return "pass the checkpoint of this model"
