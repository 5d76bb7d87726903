"""Drawing a batch of prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..guidance import GuidanceHandle
from .arguments import call_arguments
from .failing import failures_in_one_line
from .finite import refuse_not_finite
from .kinds import pipeline_for
from .metadata import Record, text_of
from .prompts import unread_part
from .record import describe
from .schedulers import check_steps_of
from .settings import GenerationSettings
from .start_picture import digests

Progress = Callable[[float], object]


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A picture and how it was made.

    Attributes:
        image: The picture.
        index: Its number in the run, from 0.
        record: All its settings, which are enough to draw it again: see `describe`.
        flagged: Whether the model's safety checker blacked it out.
        unread: The end of the prompt that the model's text encoders did not read; usually empty.
        unread_negative: The same of the negative prompt.
        ignores_negative: Whether the negative prompt had no effect, without classifier-free
            guidance.
        attended: Share of the weakened passes in which a position was blurred, on the grid of the
            attention layer, (height, width), 0 to 1; `None` if not recorded or if nothing was
            blurred.
    """

    image: Image.Image
    index: int
    record: Mapping[str, Any]
    flagged: bool = False
    unread: str = ""
    unread_negative: str = ""
    ignores_negative: bool = False
    attended: NDArray[np.float64] | None = None

    @property
    def prompt(self) -> str:
        """The prompt of the picture."""
        return self.record["prompt"]

    @property
    def seed(self) -> int:
        """The seed of the picture."""
        return self.record["seed"]

    @property
    def warnings(self) -> list[str]:
        """Sentences on what the model ignored of the prompts; usually none."""
        parts = (("prompt", self.unread), ("negative prompt", self.unread_negative))
        found = [
            f"the {kind} is too long for this model, and its end was cut: {_end(unread)!r}"
            for kind, unread in parts
            if unread
        ]
        if self.ignores_negative:
            found.append("the negative prompt has no effect: classifier-free guidance is off")
        return found

    @property
    def parameters(self) -> str:
        """All settings of the picture, in the format of `format_parameters`."""
        return text_of(self.record)


class PromptArtist:
    """A pipeline with settings that draws pictures of prompts.

    Attributes:
        sag_scale: Scale of guidance, from the settings or from the pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        settings: GenerationSettings,
        model_name: str | None = None,
        record_attention: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        """Choose the pipeline for the settings; draw nothing yet.

        Args:
            pipeline: Its `guidance` holds the settings of self-attention guidance.
            settings: Settings that all pictures share.
            model_name: Name for the metadata; `None` leaves it out.
            record_attention: Whether to record where the pictures were blurred.
            on_progress: As in `generate`.

        Raises:
            ValueError: The scheduler can't take so many or so few steps, or the model can't begin
                with a picture.
        """
        check_steps_of(pipeline.scheduler, settings.num_inference_steps)
        self.pipeline = pipeline_for(pipeline, settings)
        self.settings = settings
        self.model_name = model_name
        scale = settings.sag_scale
        self.sag_scale = pipeline.guidance.scale if scale is None else scale
        self.record_attention = record_attention and self.sag_scale != 0
        self.on_progress = on_progress

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], first: int = 0
    ) -> Iterator[GeneratedImage]:
        """Draw pictures in one batch.

        Args:
            prompts: One for each picture.
            seeds: One for each picture.
            first: Number of the first picture in the run.

        Raises:
            FloatingPointError: A prediction or a picture is NaN or infinite.
        """
        count = len(prompts)
        callback = _StepCallback(count, self.record_attention, self.on_progress)
        with failures_in_one_line():
            output: Any = self.pipeline(
                **call_arguments(self.pipeline, prompts, self.settings, callback),
                generator=seeded_generators(self.pipeline.scheduler, seeds),
                sag_scale=self.sag_scale,
            )
        if not np.isfinite(output.images).all():
            raise FloatingPointError(
                "the decoded picture is not finite: the VAE overflows or its weights are damaged; "
                "if it runs in float16, use bfloat16 or float32"
            )
        images = self.pipeline.numpy_to_pil(output.images)
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * count
        record = self._record(images[0].size, count)
        negative = self.settings.negative_prompt
        unread_negative = unread_part(self.pipeline, negative)
        has_cfg = getattr(self.pipeline, "do_classifier_free_guidance", True)
        ignores_negative = bool(negative) and not has_cfg
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            yield GeneratedImage(
                image=images[number],
                index=first + number,
                record={**record, "prompt": prompt, "seed": seed},
                flagged=bool(flagged[number]),
                unread=unread_part(self.pipeline, prompt),
                unread_negative=unread_negative,
                ignores_negative=ignores_negative,
                attended=callback.attended(number),
            )

    def _record(self, size: tuple[int, int], together: int) -> Record:
        """The record of a batch with its size, on which the last bits of pictures depend."""
        return describe(
            self.pipeline,
            self.settings,
            model=self.model_name,
            size=size,
            device=self.pipeline._execution_device.type,
            together=together,
            weakened_predictions=weakened_predictions(self.pipeline, self.sag_scale),
            **({"start": digests(self.settings)} if self.settings.image is not None else {}),
        )


def weakened_predictions(pipeline: Any, scale: float) -> int:
    """How many predictions of the weakened network the last call of a pipeline made.

    Args:
        pipeline: A guided pipeline.
        scale: The scale of guidance in that call; 0 makes none.
    """
    handle: GuidanceHandle | None = pipeline.guidance_handle
    return 0 if scale == 0 or handle is None else handle.steps


def _end(text: str) -> str:
    return text if len(text) <= 60 else f"...{text[-60:]}"


def seeded_generators(scheduler: Any, seeds: Sequence[int]) -> list[torch.Generator]:
    """Generators of random numbers for pictures, on the CPU so that all devices draw the same.

    Args:
        scheduler: A diffusers scheduler; if it has its own seeds, they are set, too.
        seeds: One for each picture.

    Returns:
        Generators for the `generator` argument of a pipeline.
    """
    if hasattr(scheduler, "noise_sampler_seed"):
        # DPM-Solver-SDE takes its noise from these seeds instead of the generators.
        scheduler.noise_sampler_seed = list(seeds)
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


class _StepCallback:
    """A callback after each step that records attention and reports progress."""

    def __init__(self, count: int, record: bool, on_progress: Progress | None) -> None:
        self.count = count
        self.record = record
        self.on_progress = on_progress
        self.mask: Any = None
        self.masks = 0
        self.blurred: Any = 0

    def __call__(
        self, pipe: Any, step: int, timestep: object, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if self.record and pipe.guidance_handle is not None:
            self._add(pipe.guidance_handle)
        refuse_not_finite("the sample", kwargs["latents"], step, timestep)
        if self.on_progress is not None:
            # Image to image leaves out the first of the scheduler's timesteps.
            steps = getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps))
            self.on_progress(self.count / steps)
        return kwargs

    def _add(self, handle: GuidanceHandle) -> None:
        # After a step without a mask of its own, the handle still holds an earlier one.
        if handle.mask is not None and handle.mask is not self.mask:
            self.mask = handle.mask
            self.masks += 1
            self.blurred = self.blurred + handle.mask.cpu().numpy().astype(np.float64)

    def attended(self, number: int) -> NDArray[np.float64] | None:
        return self.blurred[number] / self.masks if self.masks else None
