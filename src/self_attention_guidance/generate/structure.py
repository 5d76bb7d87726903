"""A model's denoiser without its weights, for inspection."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import torch
from torch import nn

from ..denoiser.families import family_of
from ..models.originals import ADMUNet2DModel, OriginalDiTModel
from .finding import model_folder

_OURS: dict[str, type[nn.Module]] = {
    "ADMUNet2DModel": ADMUNet2DModel,
    "OriginalDiTModel": OriginalDiTModel,
}


def load_structure(model: str) -> nn.Module:
    """Build a model's denoiser from its config alone, on torch's meta device.

    Args:
        model: Name of a builtin model, a folder in diffusers format, or a hub id.

    Raises:
        ValueError: There is no such model, or its denoiser is not supported.
    """
    folder = model_folder(model)
    found = [folder / part / "config.json" for part in ("unet", "transformer")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"model={model!r} has neither unet/config.json nor transformer/config.json"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        name = str(config["_class_name"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        file = f"{path.parent.name}/{path.name}"
        raise ValueError(
            f"model={model!r}: {file} is not the config of a denoiser: {error!r}"
        ) from error
    cls: Any = _OURS.get(name, getattr(diffusers, name, None))
    if not isinstance(cls, type):
        raise ValueError(f"model={model!r}: there is no denoiser {name!r} in diffusers")
    family_of(cls)
    with torch.device("meta"):
        structure: nn.Module = cls.from_config(config)
    return structure
