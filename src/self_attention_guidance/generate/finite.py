"""Reporting NaN and infinity where they arise, instead of drawing a black picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..denoiser.safety import not_finite


def refuse_not_finite(name: str, tensor: Tensor, step: int, timestep: Any) -> None:
    """Refuse values that are NaN or infinite.

    Args:
        name: What was computed, for "... is not finite".
        tensor: Its values.
        step: Index of the present step, from 0.
        timestep: The timestep of the denoiser.

    Raises:
        FloatingPointError: A value is not finite; the message has the step and the likely cause.
    """
    if not bool(tensor.isfinite().all()):
        raise not_finite({name: tensor}, step, timestep)
