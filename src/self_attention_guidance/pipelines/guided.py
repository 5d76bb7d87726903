"""What all pipelines with a `sag_scale` have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager

from ..guidance import Guidance, GuidanceHandle, SelfAttentionGuidance, attach


class GuidedPipelineMixin:
    """Settings of guidance on a diffusers pipeline, which its calls attach and remove.

    Attributes:
        guidance: The settings; assign a `SelfAttentionGuidance` or another guidance to change
            them. Its `scale` is replaced by the call's `sag_scale`.
        guidance_handle: The handle of the running or last guided call: its mask and attention.
    """

    guidance: Guidance = SelfAttentionGuidance()
    guidance_handle: GuidanceHandle | None = None

    @contextmanager
    def guided(self, sag_scale: float | None) -> Generator[None]:
        """Guide the denoiser inside the `with` statement.

        Args:
            sag_scale: Weight of guidance, any finite number; 0 attaches nothing; `None` is that
                of `guidance`.

        Raises:
            ValueError: `sag_scale` is not a finite number, or the pipeline can't be guided.
        """
        guidance = self.guidance
        if sag_scale is not None:
            try:
                guidance = dataclasses.replace(guidance, scale=sag_scale)
            except ValueError as error:
                raise ValueError(f"sag_{error}") from None
        if guidance.scale == 0:
            yield
            return
        with attach(self, guidance, is_for_this_thread=True) as self.guidance_handle:
            yield
