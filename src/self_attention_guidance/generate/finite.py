"""NaN and infinity are reported where they arise, not as a black picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..denoiser.safety import not_finite


def refuse_not_finite(name: str, tensor: Tensor, step: int, timestep: Any) -> None:
    """Refuse values that are no numbers.

    Args:
        name: Of what was computed, fit for "... is not finite".
        tensor: Its values.
        step: Index of the present step, from 0.
        timestep: What the denoiser was given.

    Raises:
        FloatingPointError: Names the step and the likely cause.
    """
    if not bool(tensor.isfinite().all()):
        raise not_finite({name: tensor}, step, timestep)
