"""The names that different pipelines have for the same settings, from their signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from ..denoiser.families import config_of, denoiser_of
from ..models.builtin import RecommendedSettings
from .settings import GenerationSettings
from .start_picture import start_arguments

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""Called after a step, as diffusers does: (pipeline, step, timestep, tensors)."""


def with_defaults(recommended: RecommendedSettings, pipeline: type) -> RecommendedSettings:
    """Recommended settings, completed by the defaults of the pipeline's call.

    Args:
        recommended: What the model recommends.
        pipeline: The class of its pipeline.
    """
    parameters = _parameters(pipeline)
    own = {
        "guidance_scale": _default(parameters, _cfg_argument(parameters)),
        "num_inference_steps": _default(parameters, "num_inference_steps"),
    }
    open_ = {n: value for n, value in own.items() if getattr(recommended, n) is None}
    return replace(recommended, **open_)


def refuse_without_effect(pipeline: Any, settings: GenerationSettings) -> None:
    """Refuse settings that a model can't follow.

    Args:
        pipeline: The model.
        settings: Settings of the pictures.

    Raises:
        ValueError: There is a negative prompt that the call does not take, or would ignore.
    """
    parameters = _parameters(type(pipeline))
    # Flux and similar models have CFG besides a guidance that the network was trained with.
    ignores = "true_cfg_scale" in parameters and _cfg_argument(parameters) != "true_cfg_scale"
    if settings.negative_prompt and (ignores or "negative_prompt" not in parameters):
        raise ValueError(
            f"negative_prompt={settings.negative_prompt!r} has no effect on this model: "
            f"{type(pipeline).__name__.removeprefix('Guided')} has no classifier-free guidance here"
        )


def check_size(pipeline: Any, width: int | None, height: int | None) -> None:
    """Refuse sizes that do not fit a model's coarsest level or its patches.

    Args:
        pipeline: The model.
        width: Width in pixels; `None` is the model's own.
        height: Height in pixels; `None` is the model's own.

    Raises:
        ValueError: The size is too small, or not a multiple of the required number.
    """
    smallest, multiple = _size_limits(pipeline)
    for name, pixels in {"width": width, "height": height}.items():
        if pixels is not None and pixels < smallest:
            raise ValueError(f"{name}={pixels} must be at least {smallest} for this model")
        if pixels is not None and pixels % multiple:
            raise ValueError(f"{name}={pixels} must be a multiple of {multiple} for this model")


def check_own_size(pipeline: Any, settings: GenerationSettings, max_size: int) -> None:
    """Refuse to draw in a model's own size, without a size or a start picture, if it is too large.

    Args:
        pipeline: The model.
        settings: Settings of the pictures.
        max_size: Largest side, in pixels.

    Raises:
        ValueError: The model's own size is larger.
    """
    config: Any = config_of(cast("Any", denoiser_of(pipeline)))
    sides = getattr(pipeline, "default_sample_size", None) or config.get("sample_size") or 0
    largest = max(sides) if isinstance(sides, list | tuple) else sides
    own = largest * int(getattr(pipeline, "vae_scale_factor", 1))
    has_own_side = settings.width is None or settings.height is None
    if settings.image is None and has_own_side and own > max_size:
        raise ValueError(
            f"size: the model's own size is {own}, and a side must have at most {max_size}: choose"
            " the size to draw"
        )


def _size_limits(pipeline: Any) -> tuple[int, int]:
    """The smallest side that a model draws, and the number that divides all sides, in pixels."""
    config: Any = config_of(cast("Any", denoiser_of(pipeline)))
    levels = len(config.get("block_out_channels", ())) or 1
    scale = int(getattr(pipeline, "vae_scale_factor", 1))
    # Transformers get patches of latents, or latents packed two by two.
    multiple = 8 if levels > 1 else max(8, 2 * scale)
    return max(8, scale * 2 ** (levels - 1)), multiple


def call_arguments(
    pipeline: Any, prompts: Sequence[str], settings: GenerationSettings, on_step_end: StepEnd
) -> dict[str, Any]:
    """Arguments of a pipeline's call, under its own names.

    Args:
        pipeline: The model.
        prompts: One for each picture.
        settings: Settings of the pictures.
        on_step_end: Called after each step, if the pipeline supports it.
    """
    parameters = _parameters(type(pipeline))
    negative: list[str] | None = [settings.negative_prompt] * len(prompts)
    cfg = _cfg_argument(parameters)
    # Some pipelines do better without a negative prompt than with an empty one. Pipelines with a
    # true CFG scale have no CFG without one.
    if not settings.negative_prompt and cfg != "true_cfg_scale" and not _is_first_kind(parameters):
        negative = None
    wanted: dict[str, Any] = {
        "prompt": list(prompts),
        "negative_prompt": negative,
        "width": settings.width,
        "height": settings.height,
        "num_inference_steps": settings.num_inference_steps,
        cfg: settings.guidance_scale,
        "output_type": "np",
        **start_arguments(settings, _size_limits(pipeline)[1], len(prompts)),
    }
    if "callback_on_step_end" in parameters:
        wanted["callback_on_step_end"] = on_step_end
    elif "callback" in parameters:

        def on_step(step: int, timestep: Any, latents: Tensor) -> None:
            on_step_end(pipeline, step, timestep, {"latents": latents})

        wanted["callback"] = on_step
    return {n: value for n, value in wanted.items() if n in parameters and value is not None}


def _parameters(pipeline: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline.__call__).parameters


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    return parameters[name].default if name in parameters else None


def _cfg_argument(parameters: Mapping[str, inspect.Parameter]) -> str:
    """The argument for the CFG scale, or for the scale that the network itself takes."""
    has_another = "true_cfg_scale" in parameters
    is_unused = _default(parameters, "guidance_scale") is None
    return "true_cfg_scale" if has_another and is_unused else "guidance_scale"


def _is_first_kind(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a call is that of Stable Diffusion 1 and 2, where no text means an empty one."""
    return "clip_skip" in parameters and "prompt_2" not in parameters
