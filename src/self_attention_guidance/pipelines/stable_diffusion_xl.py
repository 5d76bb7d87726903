"""Stable Diffusion XL with Self-Attention Guidance."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionXLPipeline

from .guided import USUAL_SCALE, GuidedPipelineMixin, share_tasks, with_arguments_of


class StableDiffusionXLSAGPipeline(GuidedPipelineMixin, StableDiffusionXLPipeline):
    """diffusers' `StableDiffusionXLPipeline` with a `sag_scale` in its call.

    The attributes `guidance` and `guidance_handle` are those of `GuidedPipelineMixin`. Source: Hong
    et al., ICCV 2023, arXiv 2210.00939.
    """

    @with_arguments_of(StableDiffusionXLPipeline.__call__)
    def __call__(self, *args: Any, sag_scale: float | None = USUAL_SCALE, **kwargs: Any) -> Any:
        """Draw pictures of a prompt.

        Args:
            *args: Arguments of diffusers' class.
            sag_scale: Weight of `guidance`, any finite number; 0 is off and costs nothing. If it
                is not given, the scale of `guidance` counts, which is 0.75 unless it was changed.
            **kwargs: Arguments of diffusers' class.

        Returns:
            `StableDiffusionXLPipelineOutput` with `images`, or the tuple `(images,)`.

        Raises:
            ValueError: An argument is out of its range, or the scheduler or U-Net can't be guided.
        """
        with self.guided(sag_scale):
            return super().__call__(*args, **kwargs)


share_tasks(StableDiffusionXLSAGPipeline, "stable-diffusion-xl")
