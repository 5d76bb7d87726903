"""What a denoiser returns, with guidance in it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor


def added(output: Tensor, term: Tensor) -> Tensor:
    """A denoiser's output with the term of its guided rows added to all of its rows."""
    parts = precise(output).unflatten(0, (-1, len(term)))
    return (parts + term).flatten(0, 1).to(output.dtype)


def precise(tensor: Tensor) -> Tensor:
    """A tensor in float32, or as it is if it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def with_first(output: Any, first: Tensor) -> Any:
    """A tuple or model output with its first entry replaced."""
    if isinstance(output, tuple):
        return (first, *cast("tuple[Any, ...]", output)[1:])
    return dataclasses.replace(output, **{next(iter(output.keys())): first})
