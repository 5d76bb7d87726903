"""What all pipelines with a `sag_scale` have in common."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from ..guidance import Guidance, GuidanceHandle, SelfAttentionGuidance, attach

Call = TypeVar("Call", bound=Callable[..., Any])


class GuidedPipelineMixin:
    """Settings of guidance on a diffusers pipeline, which its calls attach and remove.

    Attributes:
        guidance: The settings; assign a `SelfAttentionGuidance` or another guidance to change
            them. Its `scale` is replaced by the call's `sag_scale`.
        guidance_handle: The handle of the running or last guided call: its mask and attention.
    """

    guidance: Guidance = SelfAttentionGuidance()
    guidance_handle: GuidanceHandle | None = None

    @contextmanager
    def guided(self, sag_scale: float | None) -> Generator[None]:
        """Guide the denoiser inside the `with` statement.

        Args:
            sag_scale: Weight of guidance, any finite number; 0 attaches nothing; `None` is that
                of `guidance`.

        Raises:
            ValueError: `sag_scale` is not a finite number, or the pipeline can't be guided.
        """
        guidance = self.guidance
        if sag_scale is not None:
            try:
                guidance = dataclasses.replace(guidance, scale=sag_scale)
            except ValueError as error:
                raise ValueError(f"sag_{error}") from None
        if guidance.scale == 0:
            yield
            return
        with attach(self, guidance, is_for_this_thread=True) as self.guidance_handle:
            yield


def with_arguments_of(parent: Callable[..., Any]) -> Callable[[Call], Call]:
    """Show a call that passes everything on with all arguments by name.

    They are those of the installed version of diffusers.

    Args:
        parent: The call that everything is passed on to.

    Returns:
        A decorator: `help` and `inspect.signature` list the arguments of `parent`, then the
        keywords that the decorated call adds.
    """

    def show(call: Call) -> Call:
        theirs = inspect.signature(parent)
        added = inspect.signature(call).parameters.values()
        shown = {
            each.name: each
            for each in (*theirs.parameters.values(), *added)
            if each.kind is not each.VAR_POSITIONAL
        }
        in_order = sorted(shown.values(), key=lambda each: each.kind)
        cast("Any", call).__signature__ = theirs.replace(parameters=in_order)
        return call

    return show
