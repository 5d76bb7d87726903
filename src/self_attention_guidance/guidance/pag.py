"""Perturbed-Attention Guidance: Ahn et al., ECCV 2024, arXiv 2403.17377."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .weak_layers import WeakLayers

if TYPE_CHECKING:
    from torch import Tensor

    from ..denoiser.weakening import PictureOperands
    from .step import Step


@dataclass(frozen=True)
class PerturbedAttentionGuidance(WeakLayers, method="pag"):
    """Guidance away from a network whose self-attention is the identity (arXiv 2403.17377, Eq. 12).

    In the perturbed layers, each position attends only to itself. In joint attention with text, it
    attends to itself and the text, and the text attends to everything as before, as in diffusers'
    `StableDiffusion3PAGPipeline`.

    Attributes:
        scale: The paper's s, any finite number: 0 is off, 3 is usual, with classifier-free guidance
            of about 4.
        branch: "cond" is the authors' choice.
        layers: Self-attention layers to perturb (see `WeakLayers`); `None` is the mid block of
            U-Nets, as in the authors' experiments (Sec. 5), and one block of transformers.

    Raises:
        ValueError: A setting is out of its range or not of its type; when attaching, a name matches
            no layer.
    """

    needs_first_pass: ClassVar[bool] = False

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Let every position of the layers attend only to itself."""
        with step.attending(self.chosen(step.denoiser), identity):
            yield None


def identity(operands: PictureOperands, kernel: Callable[[], Tensor]) -> Tensor:
    """Compute attention whose map between the picture's positions is the identity matrix."""
    import torch

    if operands.has_picture_only:
        return operands.value
    query, picture, bias = operands.query, operands.picture, operands.bias
    positions, count = query.shape[-2], picture.stop - picture.start
    seen = query.new_ones(positions, positions, dtype=torch.bool)
    seen[picture, picture] = torch.eye(count, dtype=torch.bool, device=query.device)
    if bias is None:
        return operands.attention(query, seen)
    seen = bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -torch.inf)
    return operands.attention(query, seen)
