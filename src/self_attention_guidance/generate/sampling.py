"""Prompts and seeds to pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..checks import (
    check_count,
    check_finite,
    check_prompts,
    check_text,
    seeds_of,
)
from ..finite import refuse_not_finite
from ..guidance import BlurGuidance, SelfAttentionGuidance
from ..handle import GuidanceHandle
from ..pipelines.stable_diffusion import StableDiffusionSAGPipeline
from .metadata import format_parameters, version_label
from .schedulers import scheduler_label

Progress = Callable[[float], object]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings that all pictures of a run share, checked when made.

    Attributes:
        negative_prompt: What to guide away from; has an effect with classifier-free guidance.
        sag_scale: Scale of self-attention guidance; `None` is that of `pipeline.guidance`.
        guidance_scale: Scale of classifier-free guidance; 1 or less is off.
        num_inference_steps: Sampling steps, at least 1.
        width: In pixels, a multiple of 8; `None` is the model's own.
        height: In pixels, a multiple of 8; `None` is the model's own.

    Raises:
        ValueError: A setting is outside its range.
    """

    negative_prompt: str = ""
    sag_scale: float | None = None
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        """Checks every setting."""
        check_text("negative_prompt", self.negative_prompt)
        if self.sag_scale is not None:
            check_finite("sag_scale", self.sag_scale)
        check_finite("guidance_scale", self.guidance_scale)
        check_count("num_inference_steps", self.num_inference_steps)
        for name in ("width", "height"):
            pixels = getattr(self, name)
            if pixels is not None and (check_count(name, pixels) % 8):
                raise ValueError(f"{name}={pixels} must be a multiple of 8")


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A picture and how it was made.

    Attributes:
        image: The picture.
        index: Its number in the run, from 0.
        prompt: Its prompt.
        seed: Its seed.
        parameters: All its settings, in the form of `format_parameters`.
        flagged: Whether the model's safety checker blacked it out.
        attended: Share of the guided steps at which a position was blurred, on the grid of the
            attention layer, (height, width), 0 to 1; `None` if not recorded or if no step was
            guided.
    """

    image: Image.Image
    index: int
    prompt: str
    seed: int
    parameters: str
    flagged: bool = False
    attended: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class _Job:
    index: int
    prompt: str
    seed: int


def generate(
    pipeline: StableDiffusionSAGPipeline,
    prompts: str | Sequence[str],
    settings: GenerationSettings | None = None,
    *,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 1,
    model_name: str | None = None,
    record_attention: bool = False,
    on_progress: Progress | None = None,
) -> Iterator[GeneratedImage]:
    """Makes pictures, batch by batch, as they are asked for.

    Picture k of every prompt has the seed `seed + k`, and its own generator of random numbers
    on the CPU. So a picture depends neither on the batch size nor on the other pictures of its
    batch, up to the rounding of the kernels.

    Args:
        pipeline: Its `guidance` holds the settings of self-attention guidance.
        prompts: One prompt or several; an empty text is a prompt, too.
        settings: What all pictures share; `None` is the defaults.
        seed: Seed of every prompt's first picture, at least 0.
        num_images: Pictures of each prompt.
        batch_size: Pictures made at once.
        model_name: For the metadata; `None` leaves it out.
        record_attention: Whether to record where the pictures were blurred.
        on_progress: Called after each step with the share of one picture's work that was done,
            summed over the batch: over a run, its arguments add up to the number of pictures.

    Returns:
        The pictures, prompt by prompt, in the order of their seeds.

    Raises:
        ValueError: An argument is outside its range; raised by the call, before any work.
        FloatingPointError: A prediction is NaN or infinite; raised where the pictures are asked
            for.
    """
    jobs = _jobs(check_prompts(prompts), seed, num_images)
    check_count("batch_size", batch_size)
    settings = settings or GenerationSettings()
    check_size(pipeline, settings.width, settings.height)
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    run = _Run(pipeline, settings, model_name, record_attention, on_progress)
    return (picture for batch in batches for picture in run.sample(batch))


def check_size(pipeline: StableDiffusionSAGPipeline, width: int | None, height: int | None) -> None:
    """Refuses sizes that leave a model's coarsest level without a single position.

    Args:
        pipeline: The model.
        width: In pixels; `None` is the model's own.
        height: In pixels; `None` is the model's own.

    Raises:
        ValueError: The size is too small.
    """
    levels = len(pipeline.unet.config["block_out_channels"])
    smallest = max(8, int(pipeline.vae_scale_factor) * 2 ** (levels - 1))
    for name, pixels in {"width": width, "height": height}.items():
        if pixels is not None and pixels < smallest:
            raise ValueError(f"{name}={pixels} must be at least {smallest} for this model")


class _Run:
    """One call of `generate`: what its batches share."""

    def __init__(
        self,
        pipeline: StableDiffusionSAGPipeline,
        settings: GenerationSettings,
        model_name: str | None,
        record_attention: bool,
        on_progress: Progress | None,
    ) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self.model_name = model_name
        scale = settings.sag_scale
        self.sag_scale = pipeline.guidance.scale if scale is None else scale
        self.record_attention = record_attention and self.sag_scale != 0
        self.on_progress = on_progress

    def sample(self, jobs: Sequence[_Job]) -> Iterator[GeneratedImage]:
        callback = _StepCallback(len(jobs), self.record_attention, self.on_progress)
        seeds = [job.seed for job in jobs]
        output: Any = self.pipeline(
            prompt=[job.prompt for job in jobs],
            negative_prompt=[self.settings.negative_prompt] * len(jobs),
            generator=seeded_generators(self.pipeline.scheduler, seeds),
            width=self.settings.width,
            height=self.settings.height,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            sag_scale=self.sag_scale,
            callback_on_step_end=callback,
            output_type="np",
        )
        if not np.isfinite(output.images).all():
            raise FloatingPointError(
                "the decoded picture is not finite: the VAE overflows or its weights are damaged; "
                "if it runs in float16, use bfloat16 or float32"
            )
        images = self.pipeline.numpy_to_pil(output.images)
        flagged = output.nsfw_content_detected or [False] * len(jobs)
        for number, job in enumerate(jobs):
            image = images[number]
            yield GeneratedImage(
                image=image,
                index=job.index,
                prompt=job.prompt,
                seed=job.seed,
                parameters=self._parameters(job, image.size),
                flagged=bool(flagged[number]),
                attended=callback.attended(number),
            )

    def _parameters(self, job: _Job, size: tuple[int, int]) -> str:
        values = {
            "Steps": self.settings.num_inference_steps,
            "Sampler": scheduler_label(self.pipeline.scheduler),
            "CFG scale": float(self.settings.guidance_scale),
            "Seed": job.seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model": self.model_name,
            "SAG scale": float(self.sag_scale),
        }
        if self.sag_scale != 0:
            values |= _guidance_values(self.pipeline.guidance)
        values["Version"] = version_label()
        return format_parameters(job.prompt, self.settings.negative_prompt, values)


def seeded_generators(scheduler: Any, seeds: Sequence[int]) -> list[torch.Generator]:
    """Generators of random numbers, one a picture, on the CPU so that all devices draw the same.

    Args:
        scheduler: A diffusers scheduler; if it has seeds of its own, they are set, too.
        seeds: One a picture.

    Returns:
        For the `generator` argument of a pipeline.
    """
    if hasattr(scheduler, "noise_sampler_seed"):
        # DPM-Solver-SDE takes its noise from these seeds and not from the generators.
        scheduler.noise_sampler_seed = list(seeds)
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


class _StepCallback:
    """Called by the pipeline after each step: records attention and reports progress."""

    def __init__(self, count: int, record: bool, on_progress: Progress | None) -> None:
        self.count = count
        self.record = record
        self.on_progress = on_progress
        self.guided_steps = 0
        self.blurred: Any = 0

    def __call__(
        self, pipe: StableDiffusionSAGPipeline, step: int, timestep: object, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if self.record and pipe.guidance_handle is not None:
            self._add(pipe.guidance_handle)
        refuse_not_finite({"the sample": kwargs["latents"]}, step, timestep)
        if self.on_progress is not None:
            self.on_progress(self.count / pipe.num_timesteps)
        return kwargs

    def _add(self, handle: GuidanceHandle) -> None:
        # After a step that was not guided, the handle still holds the last guided one's mask.
        if handle.mask is not None and handle.steps != self.guided_steps:
            self.guided_steps = handle.steps
            self.blurred = self.blurred + handle.mask.cpu().numpy().astype(np.float64)

    def attended(self, number: int) -> NDArray[np.float64] | None:
        return self.blurred[number] / self.guided_steps if self.guided_steps else None


def _jobs(prompts: Sequence[str], seed: int, num_images: int) -> list[_Job]:
    seeds = seeds_of(seed, num_images)
    pairs = [(prompt, number) for prompt in prompts for number in seeds]
    return [_Job(index, prompt, number) for index, (prompt, number) in enumerate(pairs)]


def _guidance_values(guidance: SelfAttentionGuidance | BlurGuidance) -> dict[str, Any]:
    with_mask = isinstance(guidance, SelfAttentionGuidance)
    return {
        "SAG form": None if with_mask else "blur guidance",
        "SAG blur sigma": float(guidance.blur_sigma),
        "SAG blur kernel size": guidance.blur_kernel_size,
        "SAG threshold": float(guidance.threshold) if with_mask else None,
        "SAG start": float(guidance.start),
        "SAG stop": float(guidance.stop),
        "SAG branch": guidance.branch,
        "SAG layer": guidance.layer if with_mask else None,
    }
