"""Denoisers that can't be guided as they are."""

from __future__ import annotations

import torch
from torch import nn


def refuse_cache(module: nn.Module) -> None:
    """Refuse a denoiser that reuses what it computed at other steps.

    Args:
        module: The denoiser, not compiled.

    Raises:
        ValueError: Its cache is on.
    """
    if getattr(module, "is_cache_enabled", False):
        raise ValueError(
            f"{type(module).__name__} reuses what it computed at other steps (enable_cache), which "
            "the second pass of guidance would mix up; call its disable_cache() first"
        )


def refuse_compiled_in_place(module: nn.Module) -> None:
    """Refuse a denoiser whose later hooks would be ignored.

    torch compiles hooks together with the module if told to, and does not look for later ones.
    Otherwise they run around what is compiled.

    Args:
        module: The denoiser, compiled or not.

    Raises:
        ValueError: It was compiled with its hooks.
    """
    if module._compiled_call_impl is None:
        return
    if getattr(torch._dynamo.config, "wrap_top_frame", False):
        raise ValueError(
            f"{type(module).__name__} was compiled in place with torch._dynamo.config."
            "wrap_top_frame, where hooks that are added later are ignored; attach first, or use "
            "torch.compile(denoiser) instead of denoiser.compile()"
        )
