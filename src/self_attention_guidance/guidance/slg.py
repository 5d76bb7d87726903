"""Skip-Layer Guidance: Stability AI, 2024; for video, Hyung et al., CVPR 2025, arXiv 2411.18664."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .weak_layers import WeakLayers

if TYPE_CHECKING:
    from torch import Tensor

    from .step import Step


@dataclass(frozen=True)
class SkipLayerGuidance(WeakLayers, method="slg"):
    """Guidance away from a network without some of its blocks.

    A block that is left out returns its input, including the text beside the picture, as with
    `skip_guidance_layers` of diffusers' `StableDiffusion3Pipeline`. Its recommended window for
    Stable Diffusion 3.5 Medium is `start=0.01, stop=0.2`. All steps are guided by default, because
    that window contains no step of a run with fewer than six.

    Attributes:
        scale: Any finite number: 0 is off, 3 is usual.
        branch: "cond" is Stability AI's choice.
        layers: Blocks to leave out (see `WeakLayers`); `None` is 7 to 9 of 24 in Stable Diffusion
            3.5, the mid block of U-Nets, and the middle block of other transformers.

    Raises:
        ValueError: A setting is out of its range or not of its type; when attaching, a name matches
            no block.
    """

    has_blocks: ClassVar[bool] = True
    needs_first_pass: ClassVar[bool] = False

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Leave out the blocks."""
        with step.skipping(self.chosen(step.denoiser)):
            yield None
