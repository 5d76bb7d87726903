"""What runs around a compiled denoiser, and not in its graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def run_uncompiled(function: Function) -> Function:
    """`torch.compiler.disable`, with the type of what it decorates, and a reason if torch can."""
    reason = (
        "guidance runs around the denoiser, not in its graph; with fullgraph=True, compile the "
        "denoiser itself, before guidance is attached, and not what calls it"
    )
    has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    keywords: dict[str, Any] = {"reason": reason} if has_reason else {}
    return cast("Function", torch.compiler.disable(function, **keywords))
