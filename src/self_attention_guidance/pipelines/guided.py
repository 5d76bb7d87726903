"""The base of all pipelines with a `sag_scale`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
from diffusers import DiffusionPipeline

from ..guidance import Guidance, GuidanceHandle, GuidanceSum, SelfAttentionGuidance, attach

Call = TypeVar("Call", bound=Callable[..., Any])


class UsualScale(float):
    """The `sag_scale` of a call that names none: it gives way to the scale of `guidance`."""


USUAL_SCALE = UsualScale(SelfAttentionGuidance().scale)


class GuidanceOf:
    """The attribute `guidance` of a pipeline, with the default of its class."""

    def __init__(self, usual: Guidance) -> None:
        """Take the default."""
        self._usual = usual

    def __get__(self, pipeline: Any, kind: type) -> Guidance | GuidanceSum:
        """Return the guidance of a pipeline, or the default of a class."""
        return self._usual if pipeline is None else vars(pipeline).get("_guidance", self._usual)

    def __set__(self, pipeline: Any, guidance: Guidance | GuidanceSum) -> None:
        """Change the guidance of a pipeline.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(cast("object", guidance), Guidance | GuidanceSum):
            raise ValueError(
                f"guidance={guidance!r:.80} must be a guidance, such as SelfAttentionGuidance(0.5),"
                " or a sum of several, a + b; to draw without, call with sag_scale=0"
            )
        vars(pipeline)["_guidance"] = guidance


class GuidedPipelineMixin:
    """Guidance settings of a diffusers pipeline; each call attaches the guidance and removes it.

    Attributes:
        guidance: The settings. To change them, assign another guidance, or a sum of several,
            `a + b`. If the call has a `sag_scale`, it replaces their `scale`.
        guidance_handle: The handle of the running or last guided call: its mask and attention.
        loras: Files and scales of loaded LoRAs, for the metadata.
    """

    guidance = GuidanceOf(SelfAttentionGuidance())
    guidance_handle: GuidanceHandle | None = None
    loras: Sequence[tuple[str, float]] = ()

    @contextmanager
    def guided(self, sag_scale: float | None) -> Generator[None]:
        """Guide the denoiser inside the `with` statement.

        Args:
            sag_scale: Weight of guidance, any finite number; 0 attaches nothing; `None` and
                `USUAL_SCALE` are the scale of `guidance`.

        Raises:
            ValueError: `sag_scale` is not a finite number, or the pipeline can't be guided.
        """
        guidance = self.guidance
        if sag_scale is not None and not isinstance(sag_scale, UsualScale):
            try:
                guidance = dataclasses.replace(guidance, scale=sag_scale)
            except ValueError as error:
                raise ValueError(f"sag_{error}") from None
        if guidance.scale == 0:
            yield
            return
        with attach(self, *guidance.parts, is_for_this_thread=True) as self.guidance_handle:
            yield

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the `model_index.json` of a saved folder.

        It names the class of diffusers that this one extends, since diffusers' loaders know only
        their own classes. If there is none, it names this class and its package.

        Args:
            json_file_path: The file to write.
        """
        index: dict[str, Any] = json.loads(cast("Any", self).to_json_string())
        parent = _diffusers_class(type(self))
        if parent is None:
            index["_module"] = type(self).__module__.split(".")[0]
        else:
            index["_class_name"] = parent.__name__
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")


@functools.cache
def guided_class(parent: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """Make a class that adds a `sag_scale` to the call of one of diffusers' pipelines.

    Args:
        parent: The class of diffusers.

    Returns:
        A subclass with `GuidedPipelineMixin`; `sag_scale=None` is the scale of its `guidance`.
    """

    @with_arguments_of(parent.__call__)
    def call(self: Any, *args: Any, sag_scale: float | None = None, **kwargs: Any) -> Any:
        with self.guided(sag_scale):
            return super(kind, self).__call__(*args, **kwargs)

    names = {"__call__": call, "__doc__": parent.__doc__}
    kind: Any = type(f"Guided{parent.__name__}", (GuidedPipelineMixin, parent), names)
    return kind


def with_arguments_of(parent: Callable[..., Any]) -> Callable[[Call], Call]:
    """Give a wrapper the signature of the call that it wraps, plus its own keywords.

    The signature is that of the installed version of diffusers.

    Args:
        parent: The wrapped call.

    Returns:
        A decorator. `help` and `inspect.signature` list the arguments of `parent`, then the
        keywords that the decorated call adds.
    """

    def show(call: Call) -> Call:
        theirs = inspect.signature(parent)
        own = inspect.signature(call).parameters.values()
        added = [each for each in own if each.kind is each.KEYWORD_ONLY]
        shown = sorted([*theirs.parameters.values(), *added], key=lambda each: each.kind)
        cast("Any", call).__signature__ = theirs.replace(parameters=shown)
        return call

    return show


def share_tasks(pipeline: type[DiffusionPipeline], model: str) -> None:
    """Let `AutoPipelineForImage2Image.from_pipe` and similar classes take one of our classes.

    Args:
        pipeline: The class.
        model: The name of its model in diffusers' tables of pipelines.
    """
    try:
        from diffusers.pipelines.auto_pipeline import SUPPORTED_TASKS_MAPPINGS
    except Exception:  # it imports a hundred pipelines; if one fails, auto pipelines do not work
        return
    mappings: list[Any] = SUPPORTED_TASKS_MAPPINGS
    mappings.append({model: pipeline})


def show_to_loaders(pipeline: type[DiffusionPipeline]) -> None:
    """Let `DiffusionPipeline.from_pretrained` load a class that extends no class of diffusers.

    Args:
        pipeline: The class; diffusers looks for classes only in its own namespace.
    """
    if not hasattr(diffusers, pipeline.__name__):
        setattr(diffusers, pipeline.__name__, pipeline)


def _diffusers_class(pipeline: type) -> type | None:
    """Return the class of diffusers that a pipeline extends; `None` if only `DiffusionPipeline`."""
    for base in pipeline.__mro__:
        if base is not DiffusionPipeline and base.__module__.startswith("diffusers."):
            return base
        if base is DiffusionPipeline:
            break
    return None
