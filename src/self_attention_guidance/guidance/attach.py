"""Attach guidances to the denoiser of a pipeline, or of a loop of one's own."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from ..denoiser.caller import refuse_unknown
from ..denoiser.families import FAMILIES, BatchLayout, denoiser_of, family_of
from ..denoiser.noise import Scheduler, check_scheduler
from ..denoiser.run import Run
from .base import Guidance
from .handle import GuidanceHandle


def attach(
    target: Any,
    *guidances: Guidance,
    scheduler: Scheduler | None = None,
    batch_layout: BatchLayout | None = None,
    is_for_this_thread: bool = False,
) -> GuidanceHandle:
    """Guide every call of a denoiser until the handle is removed.

    Several guidances share the first pass. Each has a weakened pass, and a window of steps, of its
    own; what they add is summed, in any order.

    Args:
        target: A diffusers pipeline, or a denoiser for a loop of your own.
        *guidances: At least one.
        scheduler: See `Guidance.attach`.
        batch_layout: See `Guidance.attach`.
        is_for_this_thread: Refuse calls of other threads, for a pipeline's own call.

    Raises:
        ValueError: The denoiser, its layers or the scheduler are not supported, or the denoiser is
            guided already.
    """
    if not guidances or not all(isinstance(each, Guidance) for each in guidances):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("attach needs a guidance behind its target: SelfAttentionGuidance(0.75)")
    denoiser = _checked_denoiser(target, scheduler, batch_layout)
    pipeline = None if denoiser is target else target
    run = Run(is_for_this_thread)
    return GuidanceHandle(denoiser, pipeline, guidances, run, scheduler, batch_layout)


def _checked_denoiser(target: Any, scheduler: Any, batch_layout: Any) -> nn.Module:
    """The denoiser that is to be guided, if it can be."""
    if batch_layout is not None and batch_layout not in get_args(BatchLayout):
        choices = ", ".join(get_args(BatchLayout))
        raise ValueError(f"batch_layout={batch_layout!r} must be one of {choices}")
    denoiser = denoiser_of(target)
    if denoiser is None:
        raise ValueError(
            f"target={type(target).__name__} must be a diffusers pipeline with a unet or a "
            f"transformer, or a denoiser; supported denoisers: {', '.join(FAMILIES)}"
        )
    family_of(denoiser)
    if denoiser is not target:
        refuse_unknown(target)
        if scheduler is not None:
            raise ValueError("scheduler must not be given with a pipeline: its own is used")
        scheduler = target.scheduler
    elif scheduler is None:
        raise ValueError("scheduler=None must be the scheduler that drives this denoiser")
    check_scheduler(scheduler)
    return denoiser
