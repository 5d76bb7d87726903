"""Smoothed Energy Guidance: Hong, NeurIPS 2024, arXiv 2408.00760."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from ..checks import check_number
from .weak_layers import WeakLayers

if TYPE_CHECKING:
    from torch import Tensor

    from ..denoiser.weakening import PictureOperands
    from .step import Step


@dataclass(frozen=True)
class SmoothedEnergyGuidance(WeakLayers, method="seg"):
    """Guidance away from a network whose attention has smoothed energy (arXiv 2408.00760, Eq. 8).

    The queries of some layers are blurred over the picture. This blurs the scores Q K^T over the
    queries by the same kernel (Proposition 1): they are linear in the queries, whatever norms and
    rotations came before. In joint attention with text, the queries of the text stay unchanged.

    Attributes:
        scale: The paper's gamma, any finite number: 0 is off, 3 is the author's choice.
        branch: "cond" is the author's choice.
        layers: Self-attention layers to smooth (see `WeakLayers`); `None` is the mid block of
            U-Nets, as in the author's experiments.
        blur_sigma: Standard deviation of the blur, in tokens of a layer, above 0. Infinity, or the
            text "inf", is the author's choice: each query is the mean of the picture's queries.

    Raises:
        ValueError: A setting is out of its range or not of its type; when attaching, a name matches
            no layer.
    """

    needs_first_pass: ClassVar[bool] = False

    _: KW_ONLY
    blur_sigma: float = math.inf

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.blur_sigma in ("inf", math.inf):
            object.__setattr__(self, "blur_sigma", math.inf)  # the dataclass is frozen
            return
        check_number("blur_sigma", self.blur_sigma, 0, math.inf)
        if self.blur_sigma == 0:
            raise ValueError(f"blur_sigma={self.blur_sigma!r} must be above 0: 0 smooths nothing")

    @contextmanager
    def weaken(self, step: Step) -> Generator[Tensor | None]:
        """Blur the queries of the layers over the picture's grid."""
        smoothed = functools.partial(attention_of_blurred, sigma=self.blur_sigma)
        with step.attending(self.chosen(step.denoiser), smoothed):
            yield None


def attention_of_blurred(
    operands: PictureOperands, kernel: Callable[[], Tensor], sigma: float
) -> Tensor:
    """Compute attention with queries that are blurred over the picture's grid."""
    from ..maths import gaussian_blur

    query = operands.query.clone()
    own = query[..., operands.picture, :]
    if sigma == math.inf:
        own[:] = own.mean(dim=-2, keepdim=True)
    else:
        # The author's taps, three sigma to each side; beyond eight times the picture they are flat.
        taps = max(3, min(math.ceil(6 * sigma), 8 * max(operands.grid)) // 2 * 2 + 1)
        grid = own.unflatten(-2, operands.grid).movedim(-1, -3)
        own[:] = gaussian_blur(grid, sigma, taps).movedim(-3, -1).flatten(-3, -2)
    return operands.attention(query, operands.bias)
