"""Read the tensors of original checkpoints; nothing in a file is ever executed."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

# Keys under which training scripts save weights, the best ones first: averaged weights.
_WRAPPERS = (
    *("ema", "state_dict_ema", "model_ema", "ema_model", "ema_state_dict"),
    *("state_dict", "model_state_dict", "model", "module"),
)
# What wrapped networks put before all names, or into the names of wrapped blocks.
_PREFIXES = ("module.", "model.")
_INFIX = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by their names.

    Args:
        path: A `.safetensors` file, or a file that `torch.save` wrote, with a state dict or with
            one under a key of training scripts, such as "ema", "state_dict" or "model". Averaged
            weights are taken if there are any.

    Returns:
        The tensors, on the CPU, by their names without those of wrappers, such as "module.".

    Raises:
        ValueError: The file does not exist, is damaged, or holds more than tensors or no tensors.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} must be a file, but there is none")
    content = _unwrapped(_content(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"checkpoint={str(path)!r} must hold tensors by their names")
    named = cast("dict[Any, Any]", content)
    for name, value in named.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"checkpoint={str(path)!r} must hold tensors by their names, but {name!r} is of "
                f"type {type(value).__name__}"
            )
    return _without_prefixes(named)


def _unwrapped(content: Any) -> Any:
    """What a checkpoint has under the keys of training scripts, one in the other."""
    while isinstance(content, dict):
        found = cast("dict[Any, Any]", content)
        inner = (found[name] for name in _WRAPPERS if name in found)
        content = next((each for each in inner if isinstance(each, dict) and each), None)
        if content is None:
            return found
    return content


def _without_prefixes(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names that they had before the network was wrapped."""
    # torch's `AveragedModel` counts what it has averaged.
    named = {_INFIX.sub("", name): named[name] for name in named if name != "n_averaged"}
    for prefix in _PREFIXES * 2:  # compiled, then distributed, or the other way round
        if all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def _content(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(path)
        # DiT's training script saves its arguments, too: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from None
    # A damaged pickle can raise nearly every kind of error.
    except (ArithmeticError, AttributeError, EOFError, LookupError, OSError) as error:
        raise ValueError(_damaged(path, error)) from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_damaged(path, error)) from None


def _refusal(path: Path, reason: str) -> str:
    if "unsupported" in reason.lower() and not _compression(path):
        found = re.search(r"GLOBAL (\S+)", reason)
        named = f" ({found[1]})" if found else ""
        return (
            f"checkpoint={str(path)!r} holds more than tensors{named}: loading it could run code,"
            " so it was refused and nothing was executed; if you trust its author, load it yourself"
            " and save its state dict alone"
        )
    return _damaged(path, reason)


def _damaged(path: Path, error: object) -> str:
    if kind := _compression(path):
        return f"checkpoint={str(path)!r} is compressed by {kind}: decompress it first"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"checkpoint={str(path)!r} is damaged or no checkpoint: {reason[:160]}"


def _compression(path: Path) -> str:
    """How a file is compressed; empty if it is not."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError:
        return ""  # the error says it already
    return next((kind for mark, kind in _COMPRESSED.items() if begin.startswith(mark)), "")
