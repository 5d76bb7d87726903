"""Drawing a batch of samples with a pixel-space model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..pipelines.adm import ADMPipeline
from .drawing import Progress, seeded_generators
from .failing import failures_in_one_line
from .finite import refuse_not_finite
from .sample_settings import SampleSettings
from .schedulers import check_steps_of


def draw_samples(
    pipeline: ADMPipeline,
    settings: SampleSettings,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    on_progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Draw samples in one batch.

    Args:
        pipeline: Its `guidance` and `scheduler` are part of the settings.
        settings: Settings of the samples.
        seeds: One for each sample.
        labels: Their classes; `None` draws without classes.
        on_progress: As in `SampleJob.run`.

    Returns:
        (samples, height, width, channels).

    Raises:
        ValueError: The scheduler can't take so many or so few steps.
        FloatingPointError: A prediction is NaN or infinite.
    """

    def report(pipe: Any, step: int, timestep: object, tensors: dict[str, Any]) -> Any:
        refuse_not_finite("the sample", tensors["latents"], step, timestep)
        if on_progress is not None:
            on_progress(len(seeds) / len(pipe.scheduler.timesteps))
        return tensors

    check_steps_of(pipeline.scheduler, settings.num_inference_steps)
    with failures_in_one_line():
        output: Any = pipeline(
            batch_size=len(seeds),
            class_labels=labels,
            num_inference_steps=settings.num_inference_steps,
            sag_scale=settings.sag_scale,
            classifier_scale=settings.classifier_scale,
            eta=settings.eta,
            generator=seeded_generators(pipeline.scheduler, seeds),
            output_type="latent",
            callback_on_step_end=report,
        )
    return to_uint8(output.images)


def to_uint8(samples: Tensor) -> NDArray[np.uint8]:
    """Convert samples to bytes, as the original scripts do.

    Args:
        samples: (samples, channels, height, width) in [-1, 1].

    Returns:
        (samples, height, width, channels).
    """
    pixels = ((samples.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Convert pixels to a picture, without loss.

    Args:
        pixels: (height, width, channels); one to four channels.

    Raises:
        ValueError: There are more channels.
    """
    if pixels.shape[-1] > 4:
        raise ValueError(f"pictures have at most 4 channels: the model draws {pixels.shape[-1]}")
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
