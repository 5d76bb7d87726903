"""Options that several commands share, and functions that parse their values.

A command with such options is a dataclass: typer reads its fields as the parameters of a function.
"""

# Not `from __future__ import annotations`: typer would look names up in a subclass's module.

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import parse_number
from ..guidance.text import settings_of
from .config import read_config

_GUIDANCE_OPTIONS = (
    *("blur_sigma", "blur_kernel_size", "threshold", "layer"),
    *("start", "stop", "every", "branch"),
)
_SUFFIXES = {"json": ".json", "json_file": ".json", "plot": ".png", "save_statistics": ".npz"}


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """Options of all commands that draw pictures; `None` means not given."""

    model: str
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. [default: the model's, else 50]")
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(help="For example ddim, euler-a, 'dpm++ 2m karras'. [default: the model's]"),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0
    batch_size: Annotated[int, typer.Option(help="Pictures made at once.")] = 4
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto"
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read options from a TOML file, such as steps = 25; those given here win.",
            callback=read_config,
            is_eager=True,
        ),
    ] = None
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print only paths and warnings."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(DrawingOptions):
    """`DrawingOptions` with the options of guidance; `None` means not given."""

    guidance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD[:NAME=VALUE,...]",
            help="sag, blur, pag, seg, slg or tpg, and its settings, for example"
            " 'sag:scale=0.5,blur_sigma=2'; or none. Other settings are those that the model"
            " recommends for it, else its defaults. Give it several times, or 'sag + pag', to add"
            " them up.",
        ),
    ] = None
    blur_sigma: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="SAG and blur: width of the blur. [default: the model's, else 1; pixel-space: 9]",
        ),
    ] = None
    blur_kernel_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="SAG and blur: size of the blur's kernel, odd. [default: the model's, else 9;"
            " pixel-space: 31]",
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0, help="SAG: attention above this is blurred. [default: the model's, else 1]"
        ),
    ] = None
    layer: Annotated[
        str | None, typer.Option(help="SAG: the attention layer. [default: the model's]")
    ] = None
    start: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Guidance: start of the guided part of the steps."),
    ] = None
    stop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Guidance: end of the guided part of the steps."),
    ] = None
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Guidance: a preset at a sixth of the cost, for the middle steps only."
        ),
    ] = False
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Guidance: a second pass at every n-th step. [default: the model's, else 1]",
        ),
    ] = None

    def guidance_arguments(self) -> dict[str, Any]:
        """The settings of guidance that were given, for `Guidance.from_dict`.

        Raises:
            ValueError: One is unknown, given twice or outside its range.
        """
        given = {name: getattr(self, name, None) for name in _GUIDANCE_OPTIONS}
        scales = (getattr(self, name, None) for name in ("sag_scale", "sag_scales"))
        return settings_of(
            self.guidance or [],
            {name: value for name, value in given.items() if value is not None},
            any(scale is not None for scale in scales),
        )


@dataclass(frozen=True, kw_only=True)
class PromptOptions(SamplingOptions):
    """Options of all commands that draw prompts; `None` means not given."""

    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE|HUB_ID",
            help="A builtin model, a diffusers folder, a .safetensors file or a hub id.",
        ),
    ] = "emoji"
    seed: Annotated[int, typer.Option(help="Seed of each prompt's first picture.")] = 0
    negative_prompt: Annotated[str, typer.Option(help="What to guide away from.")] = ""
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is off. [default: the model's, else 7.5]"),
    ] = None
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="In pixels. [default: the model's]")
    ] = None
    branch: Annotated[
        str | None,
        typer.Option(help="Guidance: uncond or cond. [default: the model's, else its own]"),
    ] = None
    max_size: Annotated[int, typer.Option(min=8, help="Largest side, in pixels.")] = 2048
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="A LoRA in a .safetensors file; several add up."),
    ] = None
    offload: Annotated[
        str | None,
        typer.Option(
            metavar="model|sequential",
            help="For GPUs with little memory: keep one network or one layer there at a time.",
        ),
    ] = None
    is_compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the network: it takes a minute at first, then it is faster.",
        ),
    ] = False
    image: Annotated[
        str | None,
        typer.Option(metavar="PICTURE", help="Start from this picture: image to image."),
    ] = None
    mask: Annotated[
        str | None,
        typer.Option(metavar="PICTURE", help="White where --image is redrawn: inpainting."),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(help="How much of --image changes, 0 to 1. [default: the model's]"),
    ] = None

    def loading_arguments(self) -> dict[str, Any]:
        """Arguments of `load_pipeline`.

        Raises:
            ValueError: A LoRA is missing, or an option is outside its range.
        """
        from ..generate.loras import parse_lora

        if self.offload not in (None, "model", "sequential"):
            raise ValueError(f"offload={self.offload!r} must be model or sequential")
        return {
            "device": self.device,
            "dtype": self.dtype,
            "loras": tuple(map(parse_lora, self.lora or ())),
            "offload": self.offload,
            "is_compiled": self.is_compiled,
        }

    def generation_arguments(self) -> dict[str, Any]:
        """Arguments of `GenerationSettings`; `None` means not given."""
        width, height = parse_size(self.size) if self.size is not None else (None, None)
        return {
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.steps,
            "width": width,
            "height": height,
            "image": self.image,
            "mask": self.mask,
            "strength": self.strength,
        }


@dataclass(frozen=True, kw_only=True)
class OneScaleOptions(PromptOptions):
    """`PromptOptions` with one scale of guidance; `None` means not given."""

    sag_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance: 0 is off. [default: the model's, else the method's own: for SAG 0.75;"
            " pixel-space: 0.5]"
        ),
    ] = None

    def generation_arguments(self) -> dict[str, Any]:
        """Arguments of `GenerationSettings`; `None` means not given."""
        return super().generation_arguments() | {"sag_scale": self.sag_scale}


def prompts_of(file: str | None) -> list[str]:
    """The prompts of a file, one per line; empty lines are skipped.

    Args:
        file: UTF-8 text; "-" is stdin, and `None` has no prompts.

    Raises:
        ValueError: It cannot be read, or holds no prompt.
    """
    if file is None:
        return []
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        # Not `splitlines`: a prompt may hold separators that are no line's end in an editor.
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"prompts_file={file!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file={file!r} is no text in UTF-8: {error.reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file={file!r} holds no prompt")
    return prompts


def parse_size(size: str) -> tuple[int, int]:
    """Read a size like "512x768".

    Args:
        size: Width and height in pixels.

    Returns:
        Width, height.

    Raises:
        ValueError: It has another format.
    """
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size={size!r} must be WIDTHxHEIGHT in pixels, for example 512x768")
    return int(width), int(height)


def parse_numbers(text: str) -> list[float]:
    """Read numbers like "0,0.5,1".

    Args:
        text: Numbers, separated by commas.

    Raises:
        ValueError: It has another format.
    """
    try:
        return [parse_number(part, float) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"sag_scales={text!r} must be numbers separated by commas, for example 0,0.5,1"
        ) from None


def check_outputs(outputs: dict[str, Path | None], overwrite: bool) -> None:
    """Refuse files that can't be written, before any work.

    Args:
        outputs: Files by option; `None` means that none is wanted.
        overwrite: Whether existing files may be replaced.

    Raises:
        ValueError: A file's ending is wrong, or it can't be made in its folder.
        FileExistsError: A file exists and may not be replaced.
    """
    for name, path in outputs.items():
        if path is None:
            continue
        if path.suffix != _SUFFIXES[name]:
            raise ValueError(f"{name}={str(path)!r} must end in {_SUFFIXES[name]}")
        if not path.parent.is_dir():
            raise ValueError(f"{name}={str(path)!r}: there is no folder {str(path.parent)!r}")
        if path.is_dir():
            raise ValueError(f"{name}={str(path)!r} is a folder: name a file")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{name}={str(path)!r} exists: replace it with --overwrite")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise ValueError(f"{name}={str(path)!r} cannot be made: {error.strerror}") from error
