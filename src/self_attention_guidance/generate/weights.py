"""Checks for missing weights, which the libraries would silently fill with random ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

# Names of the same weights in earlier versions of the libraries and their classes.
_FORMER_NAMES = {
    r"\.query\.": ".to_q.",
    r"\.key\.": ".to_k.",
    r"\.value\.": ".to_v.",
    r"\.proj_attn\.": ".to_out.0.",
    r"^(text_model|vision_model)\.": "",
}


def refuse_missing_weights(model: str, pipeline: Any, folder: str | Path) -> None:
    """Refuse a pipeline if not every weight came from its folder.

    Args:
        model: As the user named it, for the message.
        pipeline: The loaded pipeline.
        folder: The folder that it was loaded from.

    Raises:
        ValueError: A weight is not in the folder's files, or is not a floating-point number.
    """
    for name, component in pipeline.components.items():
        own = Path(folder) / name
        files = sorted((own if own.is_dir() else Path(folder)).glob("*.safetensors"))
        if not isinstance(component, nn.Module) or not files:
            continue
        missing = _missing(component, files)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"model={model!r} cannot be loaded: the files of its {name} do not hold"
                f" {missing[0]!r}{more}: they are damaged, or of another model"
            )
        if not getattr(component, "is_quantized", False):
            _refuse_whole_numbers(model, name, component)


def refuse_unloaded_weights(model: str, pipeline: Any) -> None:
    """Refuse a pipeline if a weight was not loaded.

    Args:
        model: As the user named it, for the message.
        pipeline: The loaded pipeline.

    Raises:
        ValueError: A weight has a shape but no values.
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            empty = [weight for weight, value in component.named_parameters() if value.is_meta]
            if empty:
                raise ValueError(
                    f"model={model!r} cannot be loaded: it does not hold {empty[0]!r} of its"
                    f" {name}: it is damaged, or of another model"
                )


def _missing(component: nn.Module, files: list[Path]) -> list[str]:
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored.update(map(_present_name, opened.keys()))
    state = component.state_dict(keep_vars=True)
    loaded = {state[name].data_ptr() for name in state if _present_name(name) in stored}
    # A weight with two names is in the files once.
    absent = (name for name in state if _present_name(name) not in stored)
    return [name for name in absent if state[name].data_ptr() not in loaded]


def _present_name(name: str) -> str:
    for former, present in _FORMER_NAMES.items():
        name = re.sub(former, present, name)
    return name


def _refuse_whole_numbers(model: str, name: str, component: nn.Module) -> None:
    for weight, value in component.named_parameters():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"model={model!r} cannot be loaded: {weight!r} of its {name} is {kind}, not a"
                " floating-point number"
            )
