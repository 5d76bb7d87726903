"""What the folder of a model is for, from its `model_index.json`, before any weight is read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
from diffusers import DiffusionPipeline

from ..denoiser.families import FAMILIES
from ..pipelines.guided import guided_class
from ..pipelines.stable_diffusion import StableDiffusionSAGPipeline

PIXEL_CLASSES = ("ADMPipeline", "DDPMPipeline", "DDIMPipeline")

_SD_CHANNELS = {9: "inpainting", 8: "editing pictures by instructions (InstructPix2Pix)"}


def model_index(model: str, folder: Path) -> dict[str, Any]:
    """The content of a folder's `model_index.json`.

    Args:
        model: As the user named it, for the message.
        folder: In diffusers format.

    Raises:
        ValueError: There is none, or it can't be read.
    """
    return _json_object(
        model, folder / "model_index.json", "give the folder that save_pretrained wrote"
    )


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
    name = str(index.get("_class_name"))
    if name in PIXEL_CLASSES:
        raise ValueError(
            f"model={model!r} is a pixel-space model ({name}), which takes no prompts: draw from"
            " it with `sag sample`"
        )
    if is_stable_diffusion(index):
        _refuse_more_channels(model, folder)
        return StableDiffusionSAGPipeline
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


def is_stable_diffusion(index: Mapping[str, Any]) -> bool:
    """Whether a `model_index.json` lists components of Stable Diffusion 1 and 2 only.

    Args:
        index: Its content.
    """
    components = {key for key in index if not key.startswith("_")}
    known = inspect.signature(StableDiffusionSAGPipeline.__init__).parameters
    return "unet" in components and components.issubset(known)


def _refuse_more_channels(model: str, folder: Path) -> None:
    """Refuse U-Nets that see more than the latents."""
    if not (folder / "unet/config.json").is_file():
        return
    config = _json_object(model, folder / "unet/config.json", "it is damaged")
    channels, drawn = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != drawn:
        purpose = _SD_CHANNELS.get(channels, "more than text to image")
        raise ValueError(
            f"model={model!r} is for {purpose}: its U-Net takes {channels} channels, and draws"
            f" {drawn}; only text to image is supported here"
        )


def _json_object(model: str, file: Path, advice: str) -> dict[str, Any]:
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model={model!r} is a folder without {file.name}: {advice}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"model={model!r}: {file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"model={model!r}: {file.name} must hold a JSON object")
    return cast("dict[str, Any]", found)
