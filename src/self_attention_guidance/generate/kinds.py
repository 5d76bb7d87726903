"""The class of pipeline for a model and a task, chosen before any weight is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline

from ..denoiser.families import FAMILIES
from ..pipelines.guided import guided_class
from ..pipelines.stable_diffusion import StableDiffusionSAGPipeline
from .finding import check_prompt_index, is_stable_diffusion
from .settings import GenerationSettings


def prompt_pipeline(model: str, index: Mapping[str, Any], folder: Path) -> type[DiffusionPipeline]:
    """The class of pipeline that draws prompts with a model, guided.

    Args:
        model: As the user named it, for the message.
        index: The content of its `model_index.json`.
        folder: Folder of its other files, if they are on this machine.

    Returns:
        `StableDiffusionSAGPipeline` if it fits, else a guided subclass of the model's own class.

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
    denoisers = [str(part[-1]) for part in parts if isinstance(part, list) and part]
    if not any(denoiser in FAMILIES for denoiser in denoisers):
        raise ValueError(
            f"model={model!r} is of the class {name}, whose denoiser can't be guided"
            f" ({', '.join(denoisers) or 'it has none'}); supported: "
            f"{', '.join(FAMILIES)}"
        )
    return guided_class(parent)


def pipeline_for(pipeline: Any, settings: GenerationSettings) -> Any:
    """The pipeline for some settings: another one if drawing begins with a picture.

    Args:
        pipeline: A guided pipeline for prompts, or one that this function returned.
        settings: Settings of the pictures.

    Returns:
        The pipeline itself, or a guided one with the same networks and scheduler.

    Raises:
        ValueError: diffusers has none for this model.
    """
    if settings.image is None or _begins_with_pictures(type(pipeline)):
        return pipeline
    has_mask = settings.mask is not None
    found = _class_for(type(pipeline), has_mask)
    if found is None:
        raise ValueError(why_no_start(type(pipeline), has_mask))
    kind: Any = guided_class(found)
    parts = {**pipeline.config, **pipeline.components}
    expected = inspect.signature(kind.__init__).parameters
    other = kind(**{name: part for name, part in parts.items() if name in expected})
    other.guidance, other.loras = pipeline.guidance, pipeline.loras
    other.set_progress_bar_config(disable=True)
    return other


def own_strength(pipeline: type, has_mask: bool = False) -> float | None:
    """How much of a start picture changes if no strength is given; `None` if that is not known.

    Args:
        pipeline: The class of a model's pipeline for prompts.
        has_mask: Whether a mask is given, too.
    """
    kind: Any = pipeline if _begins_with_pictures(pipeline) else _class_for(pipeline, has_mask)
    if kind is None:
        return None
    return inspect.signature(kind.__call__).parameters["strength"].default


def why_no_start(pipeline: type, has_mask: bool = False) -> str | None:
    """Why a model can't begin with a picture; `None` if it can.

    Args:
        pipeline: The class of its pipeline for prompts.
        has_mask: Whether a mask is given, too.
    """
    if _class_for(pipeline, has_mask) is not None:
        return None
    option, does = ("mask", "inpainting") if has_mask else ("image", "image to image")
    name = pipeline.__name__.removeprefix("Guided")
    return f"{option} must not be given: diffusers has no {does} for {name}"


def _class_for(pipeline: type, has_mask: bool) -> type[DiffusionPipeline] | None:
    """diffusers' class for image to image, or for inpainting, with the model of a pipeline."""
    task: Any = auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    if has_mask:
        task = auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING
    for model, kind in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items():
        found = task.get(model) if kind in pipeline.__mro__ else None
        # Some edit a picture that they see as a condition, instead of beginning with it.
        if found is not None and _begins_with_pictures(found):
            return found
    return None


def _begins_with_pictures(pipeline: type) -> bool:
    return "strength" in inspect.signature(pipeline.__call__).parameters
