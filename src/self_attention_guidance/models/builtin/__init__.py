"""The small trained models that ship with the package, and their loader.

A model folder may hold a file `sag_settings.json`, with the settings that suit the model according
to measurements. All of its sections are optional: `guidance` and `fast` (the usual preset and the
fast preset, as `Guidance.from_dict` takes them, for example `{"method": "sag", "scale": 2.0}`),
`generation` (`guidance_scale`, `num_inference_steps`) and `compare` (`prompts`, `sag_scales`).

In an older form, both presets have no `method`. Then `guidance` holds settings of "sag", and `fast`
holds changes to `fast()` of that guidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from ..versions import dtype_argument

if TYPE_CHECKING:
    from ...guidance import Guidance
    from ...pipelines.adm import ADMPipeline
    from ...pipelines.stable_diffusion import StableDiffusionSAGPipeline

SETTINGS_FILE = "sag_settings.json"

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class RecommendedSettings:
    """The settings that a model folder recommends for itself.

    Attributes:
        guidance: The usual guidance as `Guidance.from_dict` takes it, "sag" if it has no "method";
            empty for the defaults.
        fast: The fast preset in the same form. Without a "method", it holds changes to `fast()` of
            the usual guidance.
        guidance_scale: Scale of classifier-free guidance, 1 is off; `None` recommends nothing.
        num_inference_steps: Sampling steps, at least 1; `None` recommends nothing.
        compare_prompts: Prompts that show the model at its best; may be empty.
        compare_sag_scales: Guidance scales worth comparing; may be empty.
    """

    guidance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fast: Mapping[str, Any] = field(default_factory=dict[str, Any])
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    compare_prompts: tuple[str, ...] = ()
    compare_sag_scales: tuple[float, ...] = ()

    def make_guidance(self) -> Guidance:
        """Make the recommended guidance.

        Returns:
            The guidance; a `SelfAttentionGuidance` with its defaults, if nothing is recommended.

        Raises:
            ValueError: A setting is unknown or outside its range.
        """
        from ...guidance import Guidance

        with _named("guidance"):
            return Guidance.from_dict({"method": "sag", **self.guidance})

    def make_fast_guidance(self) -> Guidance:
        """Make the fast preset, a guidance that costs little.

        If `fast` has a "method", it is the whole preset. If not, scale and guided steps are those
        of `Guidance.fast`, other settings are those of `make_guidance`, and `fast` replaces some.

        Raises:
            ValueError: A setting is unknown or outside its range.
        """
        from ...guidance import Guidance

        usual = self.make_guidance()
        with _named("fast"):
            given = Guidance.from_dict({"method": usual.method, **self.fast})
            if "method" in self.fast:
                return given
            presets = ("method", "scale", "start", "stop", "every")
            kept = {name: value for name, value in self.guidance.items() if name not in presets}
            return usual.fast(**{**kept, **self.fast})


def builtin_names() -> tuple[str, ...]:
    """Return the names of the models that ship with the package, in alphabetical order."""
    return tuple(sorted(path.parent.name for path in _HERE.glob("*/model_index.json")))


def builtin_folder(name: str) -> Path:
    """Return the folder of a builtin model, in diffusers format.

    Args:
        name: One of `builtin_names()`.

    Raises:
        ValueError: There is no builtin model of this name.
    """
    if name not in builtin_names():
        names = ", ".join(builtin_names()) or "none in this installation"
        raise ValueError(f"name={name!r} is not a builtin model: the builtin models are {names}")
    return _HERE / name


@overload
def builtin_model(
    name: Literal["emoji", "emoji-styles"] = "emoji", **from_pretrained_arguments: object
) -> StableDiffusionSAGPipeline: ...
@overload
def builtin_model(
    name: Literal["emoji-adm"], **from_pretrained_arguments: object
) -> ADMPipeline: ...
@overload
def builtin_model(
    name: str, **from_pretrained_arguments: object
) -> StableDiffusionSAGPipeline | ADMPipeline: ...
def builtin_model(
    name: str = "emoji", **from_pretrained_arguments: object
) -> StableDiffusionSAGPipeline | ADMPipeline:
    """Load a model that ships with the package, without network access.

    Args:
        name: One of `builtin_names()`. All make 64x64 pictures of emoji: "emoji" from prompts,
            "emoji-styles" from prompts that name a thing, a style and a background, and "emoji-adm"
            without prompts, as a pixel-space model.
        **from_pretrained_arguments: Passed to the pipeline's `from_pretrained`, for example
            `dtype=torch.bfloat16`, called `torch_dtype` before diffusers 0.40 (the default is
            `torch.float32`).

    Returns:
        The pipeline, with `pipe.guidance` set to the model's recommended settings.

    Raises:
        ValueError: There is no builtin model of this name.
    """
    import torch

    folder = builtin_folder(name)
    arguments: dict[str, object] = {"use_safetensors": True, "local_files_only": True}
    if not {"dtype", "torch_dtype"} & from_pretrained_arguments.keys():
        arguments |= dtype_argument(torch.float32)
    arguments |= from_pretrained_arguments
    pipeline = _pipeline_class(folder).from_pretrained(str(folder), **arguments)
    recommended = recommended_settings(folder)
    if recommended.guidance:
        pipeline.guidance = recommended.make_guidance()
    return pipeline


def _pipeline_class(folder: Path) -> type[StableDiffusionSAGPipeline] | type[ADMPipeline]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index["_class_name"] == "ADMPipeline":
        from ...pipelines.adm import ADMPipeline

        return ADMPipeline
    from ...pipelines.stable_diffusion import StableDiffusionSAGPipeline

    return StableDiffusionSAGPipeline


def recommended_settings(folder: str | Path) -> RecommendedSettings:
    """Read the settings that a model folder recommends in its `sag_settings.json`.

    Args:
        folder: A model folder; without the file, nothing is recommended.

    Returns:
        The checked settings.

    Raises:
        ValueError: The file is not JSON, or a setting is unknown or outside its range; the
            message names the file.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        return RecommendedSettings()
    try:
        settings = _parse(json.loads(path.read_text(encoding="utf-8")))
        settings.make_guidance()
        settings.make_fast_guidance()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def _parse(content: object) -> RecommendedSettings:
    sections = _mapping("the file", content)
    _check_keys("the file", sections, {"guidance", "fast", "generation", "compare"})
    generation = _mapping("generation", sections.get("generation", {}))
    _check_keys("generation", generation, {"guidance_scale", "num_inference_steps"})
    compare = _mapping("compare", sections.get("compare", {}))
    _check_keys("compare", compare, {"prompts", "sag_scales"})
    return RecommendedSettings(
        guidance=_mapping("guidance", sections.get("guidance", {})),
        fast=_mapping("fast", sections.get("fast", {})),
        guidance_scale=_optional(generation, "guidance_scale", _is_number, "a number"),
        num_inference_steps=_optional(
            generation, "num_inference_steps", _is_step_count, "a whole number, at least 1"
        ),
        compare_prompts=_listed(compare, "prompts", _is_text, "a list of texts"),
        compare_sag_scales=_listed(compare, "sag_scales", _is_number, "a list of numbers"),
    )


@contextmanager
def _named(section: str) -> Generator[None]:
    """Add the section of the file to the message of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from None


def _mapping(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not {value!r}")
    return cast("dict[str, Any]", value)


def _check_keys(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"{where}: {key!r} is unknown; known names are {names}")


def _optional(
    section: Mapping[str, Any], key: str, holds: Callable[[object], bool], rule: str
) -> Any:
    value = section.get(key)
    if value is not None and not holds(value):
        raise ValueError(f"{key}={value!r} must be {rule}")
    return value


def _listed(
    section: Mapping[str, Any], key: str, holds: Callable[[object], bool], rule: str
) -> tuple[Any, ...]:
    values: object = section.get(key, [])
    if not isinstance(values, list) or not all(map(holds, cast("list[object]", values))):
        raise ValueError(f"{key}={values!r} must be {rule}")
    return tuple(cast("list[object]", values))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_step_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: object) -> bool:
    return isinstance(value, str)
