"""Read the tensors of original checkpoints; nothing in a file is ever executed."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

# Keys under which training scripts save weights, the best ones first; and prefixes that wrapped
# networks put before names.
_WRAPPERS = ("ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by their names.

    Args:
        path: A `.safetensors` file, or a file that `torch.save` wrote, with a state dict or with
            one under the key "ema", "state_dict" or "model".

    Returns:
        The tensors, on the CPU, by their names without "module." and "_orig_mod.".

    Raises:
        ValueError: The file does not exist, is damaged, or holds more than tensors or no tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} must be a file, but there is none")
    content = _content(path)
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
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


def _without_prefixes(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names that they had before the network was wrapped."""
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
    if "unsupported" in reason.lower():
        return (
            f"checkpoint={str(path)!r} holds more than tensors: loading it could run code, so it "
            "was refused and nothing was executed"
        )
    return _damaged(path, reason)


def _damaged(path: Path, error: object) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"checkpoint={str(path)!r} is damaged or no checkpoint: {reason[:160]}"
