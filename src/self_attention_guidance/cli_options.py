"""Options that several commands of the command line share, and texts to values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, cast, get_type_hints

import typer


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """The options that `generate` and `compare` have in common; `None` was not given."""

    negative_prompt: Annotated[str, typer.Option(help="What to guide away from.")] = ""
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE|HUB_ID",
            help="A builtin model, a diffusers folder, a .safetensors file or a hub id.",
        ),
    ] = "emoji"
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is off. [default: the model's, else 7.5]"),
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. [default: the model's, else 50]")
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(help="For example ddim, euler-a, 'dpm++ 2m karras'. [default: the model's]"),
    ] = None
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="In pixels. [default: the model's]")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of each prompt's first picture.")] = 0
    batch_size: Annotated[int, typer.Option(help="Pictures made at once.")] = 4
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto"
    blur_sigma: Annotated[
        float | None, typer.Option(help="SAG: width of the blur. [default: the model's, else 1]")
    ] = None
    blur_kernel_size: Annotated[
        int | None, typer.Option(help="SAG: odd. [default: the model's, else 9]")
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(help="SAG: attention above this is blurred. [default: the model's, else 1]"),
    ] = None
    layer: Annotated[
        str | None, typer.Option(help="SAG: the attention layer. [default: the model's]")
    ] = None
    branch: Annotated[
        str | None, typer.Option(help="SAG: uncond or cond. [default: the model's, else uncond]")
    ] = None
    start: Annotated[
        float | None, typer.Option(help="SAG: first guided part of the steps, 0 to 1.")
    ] = None
    stop: Annotated[
        float | None, typer.Option(help="SAG: end of the guided part of the steps, 0 to 1.")
    ] = None

    def guidance_arguments(self) -> dict[str, Any]:
        """The settings of `SelfAttentionGuidance` that were given."""
        names = ("blur_sigma", "blur_kernel_size", "threshold", "layer", "branch", "start", "stop")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def generation_arguments(self) -> dict[str, Any]:
        """Arguments of `GenerationSettings`; `None` was not given."""
        width, height = parse_size(self.size) if self.size is not None else (None, None)
        return {
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.steps,
            "width": width,
            "height": height,
        }


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces a command's parameter `shared` by the options of `SharedOptions`.

    Args:
        command: A function that takes a keyword argument `shared`.

    Returns:
        The function as typer shall see it.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    hints = get_type_hints(SharedOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(
            option.name, keyword, default=option.default, annotation=hints[option.name]
        )
        for option in fields(SharedOptions)
    ]
    kept = [parameter for parameter in own if parameter.name != "shared"]
    parameters = [parameter.replace(kind=keyword) for parameter in kept] + options

    def with_options(**arguments: object) -> None:
        given = {option.name: arguments.pop(option.name) for option in options}
        shared = SharedOptions(**cast("dict[str, Any]", given))
        command(shared=shared, **arguments)

    with_options.__doc__ = command.__doc__
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {option.name: option.annotation for option in parameters}
    return with_options


def parse_size(size: str) -> tuple[int, int]:
    """Reads a size like "512x768".

    Args:
        size: Width and height in pixels.

    Returns:
        Width, height.

    Raises:
        ValueError: It has another form.
    """
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size={size!r} must be WIDTHxHEIGHT in pixels, for example 512x768")
    return int(width), int(height)


def parse_numbers(text: str) -> list[float]:
    """Reads numbers like "0,0.5,1".

    Args:
        text: Numbers, separated by commas.

    Raises:
        ValueError: It has another form.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"sag_scales={text!r} must be numbers separated by commas, for example 0,0.5,1"
        ) from None
