"""NaN and infinity are reported where they arise, not as a black picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
        raise not_finite(name, tensor.dtype, step, timestep)


def not_finite(name: str, dtype: torch.dtype, step: int, timestep: Any) -> FloatingPointError:
    """The error that says where values are no numbers, and the likely cause.

    Args:
        name: Of what was computed, fit for "... is not finite".
        dtype: Of its values.
        step: Index of the present step, from 0.
        timestep: What the denoiser was given.
    """
    cause = "the weights are damaged, or do not fit the model's config or scheduler"
    if dtype == torch.float16:
        cause = "float16 overflows beyond 65504: use bfloat16 or float32"
    at = float(torch.as_tensor(timestep).flatten()[0])
    return FloatingPointError(f"step {step} (timestep {at:g}): {name} is not finite; {cause}")
