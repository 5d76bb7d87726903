"""Drawing for the page, for one visitor at a time."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..denoiser.families import denoiser_of
from ..denoiser.layers import attention_names, short_name
from ..generate import (
    Axis,
    Comparison,
    Cost,
    GeneratedImage,
    GenerationSettings,
    LoadedPipeline,
    Record,
    check_own_size,
    compare_axes,
    draw_grid,
    generate_one,
    make_scheduler,
    pipeline_for,
    scheduler_names,
    why_no_start,
    with_guidances,
)
from ..generate.record import choices
from ..guidance import METHODS, Guidance
from .limits import Limits, VisitorSettings
from .steps import step_pictures

OF_GUIDANCE = ("blur_sigma", "threshold", "start", "stop", "every")
"""Settings that several methods share and that the page has controls for."""
Watch = Callable[[float], object]
"""Called with the share of the work that is done, 0 to 1; may raise to stop it."""


@dataclass(frozen=True)
class Studio:
    """A model that visitors share.

    Attributes:
        model: The model; every call restores its settings.
        limits: The limits for a visitor.
    """

    model: LoadedPipeline
    limits: Limits
    _turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def pair(self, asked: VisitorSettings, watch: Watch) -> list[tuple[GeneratedImage, Cost]]:
        """Draw the same seed without and with guidance, each with its cost.

        Args:
            asked: The visitor's settings.
            watch: Called with the progress.

        Raises:
            ValueError: A setting is outside its range.
            FloatingPointError: A prediction is NaN or infinite.
        """
        with self._set_up(asked) as settings:
            pipeline, report = self.model.pipeline, _share_of(2, watch)
            both = [dataclasses.replace(settings, sag_scale=s) for s in (0.0, asked.sag_scale)]
            return [self._generate(pipeline, asked, each, report) for each in both]

    def steps(self, asked: VisitorSettings, watch: Watch) -> list[Image.Image]:
        """Draw a labelled strip of pictures for every second pass.

        Args:
            asked: The visitor's settings.
            watch: Called with the progress.

        Raises:
            ValueError: A setting is outside its range, or no step is guided.
            FloatingPointError: A prediction is NaN or infinite.
        """
        strips: list[Image.Image] = []
        report = _share_of(1, watch)
        seen = {"passes": 0, "steps": 0}

        with self._set_up(asked) as settings:
            pipeline = pipeline_for(self.model.pipeline, settings)
            pipeline.guidance_handle = None  # that of an earlier visitor's picture

            def look(share: float) -> None:
                seen["steps"] += 1
                handle = pipeline.guidance_handle
                if handle is not None and handle.steps > seen["passes"]:
                    seen["passes"] = handle.steps
                    tiles = step_pictures(pipeline, handle, 160)
                    label = f"step {seen['steps']} of {round(1 / share)}"
                    strips.append(draw_grid([list(tiles.values())], [label], list(tiles)))
                report(share)

            self._generate(pipeline, asked, settings, look)
        if not strips:
            raise ValueError("no step is guided: sag_scale is 0, or start and stop leave none")
        return strips

    def grid(self, asked: VisitorSettings, rows: Axis, columns: Axis, watch: Watch) -> Comparison:
        """Draw a grid of two settings against each other.

        Args:
            asked: The visitor's settings, where no axis changes them.
            rows: What changes from row to row, as `parse_axis` read it.
            columns: What changes from column to column, as `parse_axis` read it.
            watch: Called with the progress.

        Raises:
            ValueError: A setting is outside its range.
            FloatingPointError: A prediction is NaN or infinite.
        """
        with self._set_up(asked) as settings:
            if "guidance" in (rows.name, columns.name):  # each has its own scale
                settings = dataclasses.replace(settings, sag_scale=None)
            rows, columns = (
                with_guidances(axis, lambda given: self.model.guidance(**given))
                for axis in (rows, columns)
            )
            return compare_axes(
                self.model.pipeline,
                rows,
                columns,
                settings,
                prompt=asked.prompt,
                seed=asked.seed,
                model_name=self.model.name,
                on_progress=_share_of(len(rows.values) * len(columns.values), watch),
            )

    def _generate(
        self, pipeline: Any, asked: VisitorSettings, settings: GenerationSettings, report: Watch
    ) -> tuple[GeneratedImage, Cost]:
        return generate_one(
            pipeline,
            asked.prompt,
            settings,
            seed=asked.seed,
            model_name=self.model.name,
            record_attention=True,
            on_progress=report,
        )

    def why_no_start(self, has_mask: bool = False) -> str | None:
        """Why the model can't begin with a picture, or with one and a mask; `None` if it can."""
        return why_no_start(type(self.model.pipeline), has_mask)

    def methods(self) -> list[str]:
        """Short names of the guidances that the model supports, its own first."""
        denoiser: Any = denoiser_of(self.model.pipeline)
        own = self.model.recommended.make_guidance().method
        found: list[str] = []
        for name, method in METHODS.items():
            try:
                method().reads(denoiser)
            except ValueError:  # it can't weaken this network
                continue
            found.append(name)
        return sorted(found, key=lambda name: name != own)

    def values_to_try(self, axis: str) -> str:
        """Values of an axis that suit the model, as `parse_axis` reads them."""
        model = self.model
        prompts = [text for text in model.recommended.compare_prompts if text][:3]
        scales = model.recommended.compare_sag_scales or (0, 0.5, 1)
        denoiser: Any = denoiser_of(model.pipeline)
        layers = [short_name(name) for name in attention_names(denoiser)]
        steps = (n for n in (5, 10, 25, 50) if n <= self.limits.max_steps)
        return {
            "prompt": " | ".join(prompts or ["a cat", "a dog"]),
            "seed": "0, 1, 2",
            "guidance": ", ".join(["none", *self.methods()]),
            "scale": ", ".join(f"{scale:g}" for scale in scales),
            "cfg": "1, 3, 7.5",
            "steps": ", ".join(map(str, steps)) or "1",
            "blur": "1, 3, 9",
            "window": "0-1, 0-0.5, 0.5-1",
            "layer": ", ".join(["default", *layers[:: max(1, len(layers) // 3)][:3]]),
        }[axis]

    def _guidance(self, asked: VisitorSettings) -> Guidance:
        """The chosen guidance, with the settings that the page has controls for."""
        own = self.model.usual(asked.method).to_dict()
        chosen = {name: getattr(asked, name) for name in OF_GUIDANCE if name in own}
        if own.get("blur_sigma") == "inf" and not asked.blur_sigma:
            chosen["blur_sigma"] = "inf"  # a slider has no infinity
        if "layers" in own:
            chosen["layers"] = asked.layers.split("+") if asked.layers else None
        return Guidance.from_dict({**own, **chosen, "scale": asked.sag_scale})

    @functools.cached_property
    def schedulers(self) -> Mapping[str, Any]:
        """The schedulers that suit the model, by name; its own has an empty name."""
        own: Any = self.model.pipeline.scheduler
        found = {"": own}
        for name in scheduler_names():
            with suppress(ValueError, ImportError):  # some need a package that is not there
                found[name] = make_scheduler(name, own.config)
        return found

    def scheduler_name(self, record: Mapping[str, Any]) -> str:
        """The name of the scheduler that drew a picture; empty if it is none of these."""
        for name, scheduler in self.schedulers.items():
            made = choices(GenerationSettings(), self.model.usual(""), scheduler)
            if all(made[key] == record[key] for key in ("scheduler", "scheduler_config")):
                return name
        return ""

    def choices(self, asked: VisitorSettings) -> Record:
        """The part of a picture's record that a visitor's settings decide."""
        return choices(asked.generation(), self._guidance(asked), self.schedulers[asked.scheduler])

    def check(self, asked: VisitorSettings) -> None:
        """Refuse what is outside the limits; the guidance checks its own settings.

        Raises:
            ValueError: A setting is outside the limits; the message names it and the rule.
        """
        asked.check(self.limits)
        check_own_size(self.model.pipeline, asked.generation(), self.limits.max_size)

    def usual_size(self) -> int:
        """Pixels of a side that the page begins with; 0 is the model's own size."""
        try:
            check_own_size(self.model.pipeline, self.model.settings(), self.limits.max_size)
        except ValueError:
            return self.limits.max_size // 8 * 8
        return 0

    @contextmanager
    def _set_up(self, asked: VisitorSettings) -> Generator[GenerationSettings]:
        """Give the model a visitor's settings, and lock it for this visitor."""
        self.check(asked)
        pipeline: Any = self.model.pipeline
        with self._turn:
            before = pipeline.guidance, pipeline.scheduler
            try:
                pipeline.guidance = self._guidance(asked)
                if asked.scheduler:
                    pipeline.scheduler = make_scheduler(asked.scheduler, pipeline.scheduler.config)
                yield asked.generation()
            finally:
                pipeline.guidance, pipeline.scheduler = before


def _share_of(pictures: int, watch: Watch) -> Watch:
    """Turn the work on single pictures, as `generate` reports it, into the share of all work."""
    done = 0.0

    def report(share: float) -> None:
        nonlocal done
        done += share
        watch(min(done / pictures, 1.0))

    return report
