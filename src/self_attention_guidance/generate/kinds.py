"""What the folder of a model is for, from its `model_index.json`, before any weight is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ..denoiser.families import FAMILIES
from ..pipelines.guided import guided_class
from ..pipelines.stable_diffusion import StableDiffusionSAGPipeline
from .finding import check_prompt_index, is_stable_diffusion


def prompt_pipeline(model: str, index: Mapping[str, Any], folder: Path) -> type[DiffusionPipeline]:
    """The class of pipeline that draws prompts with a model, guided.

    Args:
        model: As the user named it, for the message.
        index: The content of its `model_index.json`.
        folder: Where its other files are, as far as they are here.

    Returns:
        `StableDiffusionSAGPipeline` where it fits, else a guided subclass of the model's own.

    Raises:
        ValueError: The model takes no prompts, needs more than prompts, or can't be guided.
    """
    check_prompt_index(model, index, folder)
    if is_stable_diffusion(index):
        return StableDiffusionSAGPipeline
    name = str(index.get("_class_name"))
    parent: Any = getattr(diffusers, name, None)
    if not (inspect.isclass(parent) and issubclass(parent, DiffusionPipeline)):
        raise ValueError(
            f"model={model!r} is of the class {name}, which diffusers {diffusers.__version__} does"
            " not have"
        )
    parameters = inspect.signature(parent.__call__).parameters
    images = [each for each in parameters if each in ("image", "control_image", "mask_image")]
    if "prompt" not in parameters or images:
        lacks = f"needs a picture ({images[0]})" if images else "takes no prompts"
        raise ValueError(
            f"model={model!r} is of the class {name}, which {lacks}: only text to image is"
            " supported here; in Python, `attach` guides it"
        )
    parts = (index.get(part) for part in ("unet", "transformer"))
    denoisers = [str(part[-1]) for part in parts if part]
    if not any(denoiser in FAMILIES for denoiser in denoisers):
        raise ValueError(
            f"model={model!r} is of the class {name}, whose denoiser can't be guided"
            f" ({', '.join(denoisers) or 'it has none'}); supported: "
            f"{', '.join(FAMILIES)}"
        )
    return guided_class(parent)
