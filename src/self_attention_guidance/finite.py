"""NaN and infinity are reported where they arise, not as a black picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def refuse_not_finite(stages: Mapping[str, Tensor], step: int, timestep: Any) -> None:
    """Refuse values that are no numbers.

    Only the last stage is looked at unless it is not finite: what went in shows there.

    Args:
        stages: What was computed, in this order, by a name that fits "... is not finite".
        step: Index of the present step, from 0.
        timestep: What the denoiser was given.

    Raises:
        FloatingPointError: Names the step, the first stage that is not finite, and the likely
            cause.
    """
    names = list(stages)
    if _is_finite(stages[names[-1]]):
        return
    first = next(name for name in names if not _is_finite(stages[name]))
    at = torch.as_tensor(timestep).flatten()[0].item()
    raise FloatingPointError(
        f"step {step} (timestep {at:g}): {first} is not finite; {_cause(stages[first].dtype)}"
    )


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _cause(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "float16 overflows beyond 65504: use bfloat16 or float32"
    return "the weights are damaged, or do not fit the model's config or scheduler"
