"""Loaded models and their default settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

from ..denoiser.families import denoiser_of, uncompiled
from ..denoiser.layers import attention_names, beginnings, block_names, resolve
from ..guidance import METHODS, Guidance, GuidanceSum, guidance_of
from ..guidance.sag import Blurring
from ..models.builtin import RecommendedSettings
from .schedulers import make_scheduler

Settings = TypeVar("Settings")

# What `Guidance.fast` chooses: the scale as a multiple of the usual one, and the steps.
_FAST_SCALE = 4 / 3
_FAST_SETTINGS = ("scale", "start", "stop", "every")


class Loaded(Generic[Settings]):
    """Base class of loaded models of all kinds."""

    pipeline: Any
    recommended: RecommendedSettings
    settings_class: Callable[..., Settings]

    def settings(self, **given: Any) -> Settings:
        """Settings of pictures: those given, and for the rest what the model recommends.

        Args:
            **given: Arguments of `GenerationSettings`, or of a pixel-space model's
                `SampleSettings`; `None` counts as not given.

        Raises:
            ValueError: A setting is outside its range.
        """
        return settings_of(self.settings_class, self.recommended, **given)

    def use(self, *, scheduler: str | None = None, fast: bool = False, **guidance: Any) -> None:
        """Set the pipeline's guidance and scheduler, and hide its progress bar.

        Args:
            scheduler: A name of `scheduler_names()`; `None` keeps the model's own.
            fast: Whether guidance is the model's fast preset instead of what it recommends.
            **guidance: Settings that differ from that guidance. With the short name of another
                guidance as "method", they differ from the defaults that the pipeline's class has
                for that one, or from its fast preset.

        Raises:
            ValueError: A setting is unknown or outside its range, or the model has no such layer.
        """
        pipeline: Any = self.pipeline
        pipeline.set_progress_bar_config(disable=True)
        chosen = self.guidance(fast, **guidance)
        for part in chosen.parts:
            _check_layers(part, denoiser_of(pipeline))
        pipeline.guidance = chosen
        if scheduler is not None:
            pipeline.scheduler = self.make_scheduler(scheduler)

    def guidance(self, fast: bool = False, **guidance: Any) -> Guidance | GuidanceSum:
        """The guidance that `use` sets.

        Args:
            fast: As in `use`.
            **guidance: As in `use`.

        Raises:
            ValueError: A setting is unknown or outside its range.
        """
        if "guidances" in guidance:  # each of several is completed as if it were alone
            several = [self.guidance(fast, **each) for each in guidance["guidances"]]
            parts = tuple(part for each in several for part in each.parts)
            return GuidanceSum(parts, guidance.get("scale", 1.0))
        own: Guidance | GuidanceSum = self.pipeline.guidance
        method = guidance.get("method", own.method)
        if fast or method != own.method:
            own = self.usual(guidance.get("method"), fast)
        if "method" not in guidance:
            self._refuse_unknown(own, fast, guidance)
        return guidance_of({**own.to_dict(), **guidance})

    def _refuse_unknown(
        self, own: Guidance | GuidanceSum, fast: bool, given: Mapping[str, Any]
    ) -> None:
        """Refuse settings that a guidance does not have which nobody has named."""
        known = own.to_dict()
        for name, value in given.items():
            others = [n for n in ("sag", *METHODS) if name in vars(METHODS[n]())]
            if name not in known and others:
                is_usual = own.method == self.usual(fast=fast).method
                whose = "which this model recommends" if is_usual else "which is set"
                raise ValueError(
                    f"{name}={value!r} is no setting of {own.method}, {whose}: method={others[0]!r}"
                    " has it"
                )

    def usual(self, method: str | None = None, fast: bool = False) -> Guidance:
        """A guidance as the model recommends it, else with the defaults of its pipeline's class.

        Args:
            method: Its short name; `None` or an empty text is the model's own.
            fast: Whether it is the fast preset.
        """
        recommended, own = self.recommended, type(self.pipeline).guidance
        if not recommended.guidance:
            presets = {"scale": own.scale * _FAST_SCALE} if "method" not in recommended.fast else {}
            fast_changes = {**presets, **recommended.fast}
            recommended = replace(recommended, guidance=own.to_dict(), fast=fast_changes)
        chosen = recommended.make_fast_guidance() if fast else recommended.make_guidance()
        if method in (None, "", chosen.method):
            return chosen
        default = default_guidance(type(self.pipeline), method)
        if not fast:
            return default
        kept = {n: value for n, value in vars(default).items() if n not in _FAST_SETTINGS}
        return default.fast(default.scale * _FAST_SCALE, **kept)

    def restore(self, record: Mapping[str, Any]) -> Settings:
        """Set the guidance and scheduler of earlier pictures, to draw them again.

        Args:
            record: What `read_record` returned. The model must be loaded with its "dtype".

        Returns:
            Their settings, for `generate`, `compare` or `SampleJob`.

        Raises:
            ValueError: A setting is unknown or outside its range.
        """
        pipeline: Any = self.pipeline
        try:
            pipeline.guidance = guidance_of(record["guidance"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"guidance: {error}") from error
        name = record["scheduler"]
        try:
            pipeline.scheduler = make_scheduler(name, record["scheduler_config"])
        except Exception as error:  # diffusers' classes raise all kinds of errors for wrong values
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"scheduler_config of {name}: {reason}") from error
        return self.settings_class(**record["settings"])

    def make_scheduler(self, name: str) -> Any:
        """A scheduler for this model.

        Args:
            name: One of `scheduler_names()`.
        """
        return make_scheduler(name, self.pipeline.scheduler.config)


def _check_layers(guidance: Guidance, denoiser: Any) -> None:
    """Refuse layers that a model does not have, before any picture."""
    name = "layer" if hasattr(guidance, "layer") else "layers"
    given = getattr(guidance, name, None)
    if not given:
        return
    has_blocks = getattr(guidance, "has_blocks", False)
    known = block_names(denoiser) if has_blocks else attention_names(denoiser)
    kind = "block with self-attention" if has_blocks else "self-attention layer"
    for each in [given] if isinstance(given, str) else given:
        try:
            resolve(denoiser, [each], known, kind)
        except ValueError:
            short = beginnings(known)
            listed = [*short[:12], "..."] if len(short) > 12 else short
            raise ValueError(
                f"{name}={each!r} is no {kind} of {type(uncompiled(denoiser)).__name__}: there are,"
                f" for short, {', '.join(listed)}; `sag layers MODEL` lists all"
            ) from None
    guidance.reads(denoiser)


def default_guidance(pipeline: Any, method: str) -> Guidance:
    """A guidance as it is where a model recommends nothing for its method.

    Args:
        pipeline: The class of the model's pipeline. The width of a blur suits latents or pixels, so
            methods that blur share the defaults of the class.
        method: Its short name.

    Raises:
        ValueError: The method is unknown.
    """
    own, found = pipeline.guidance, Guidance.from_dict({"method": method})
    if not (isinstance(own, Blurring) and isinstance(found, Blurring)):
        return found
    return replace(found, **{n: value for n, value in vars(own).items() if n in vars(found)})


def settings_of(
    settings_class: Callable[..., Settings], recommended: RecommendedSettings, **given: Any
) -> Settings:
    """Settings of pictures: those given, and for the rest what a model recommends.

    Args:
        settings_class: Class of the settings.
        recommended: What the model recommends.
        **given: Arguments of the class; `None` counts as not given.

    Raises:
        ValueError: A setting is outside its range.
    """
    known = inspect.signature(settings_class).parameters
    own = {name: value for name, value in vars(recommended).items() if name in known}
    chosen = own | {name: value for name, value in given.items() if value is not None}
    return settings_class(**{name: value for name, value in chosen.items() if value is not None})
