"""Drawing pictures from prompts and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..checks import check_count, check_prompts, seeds_of
from .arguments import check_size, refuse_without_effect
from .drawing import GeneratedImage, Progress, PromptArtist
from .settings import GenerationSettings
from .start_picture import check_start


def generate(
    pipeline: Any,
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
    """Make pictures, batch by batch, as they are requested.

    Picture k of every prompt has the seed `seed + k`, and its own generator of random numbers
    on the CPU. So a picture depends neither on the batch size nor on the other pictures of its
    batch, up to the rounding of the kernels.

    Args:
        pipeline: A pipeline from `load_pipeline`; its `guidance` holds the settings of guidance.
        prompts: One prompt or several; an empty text is a prompt, too.
        settings: Settings that all pictures share; `None` is the defaults.
        seed: Seed of every prompt's first picture, at least 0.
        num_images: Pictures of each prompt.
        batch_size: Pictures made at once.
        model_name: Name for the metadata; `None` leaves it out.
        record_attention: Whether to record where the pictures were blurred.
        on_progress: Called after each step with the work done in it, in pictures. Over a run, its
            arguments add up to the number of pictures.

    Returns:
        The pictures, prompt by prompt, in the order of their seeds.

    Raises:
        ValueError: An argument is outside its range; raised by the call, before any work.
        FloatingPointError: A prediction is NaN or infinite; raised when the pictures are
            requested.
    """
    prompts, seeds = check_prompts(prompts), seeds_of(seed, num_images)
    check_count("batch_size", batch_size)
    settings = settings or GenerationSettings()
    check_start(settings)
    check_size(pipeline, settings.width, settings.height)
    refuse_without_effect(pipeline, settings)
    artist = PromptArtist(pipeline, settings, model_name, record_attention, on_progress)
    pairs = [(prompt, number) for prompt in prompts for number in seeds]

    def pictures() -> Iterator[GeneratedImage]:
        for first in range(0, len(pairs), batch_size):
            batch = pairs[first : first + batch_size]
            yield from artist.draw([p for p, _ in batch], [s for _, s in batch], first)

    return pictures()
