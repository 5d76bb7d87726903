"""Counting the rows that a network computes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from ..denoiser.joint import counting_joined


@contextmanager
def counted_rows(denoiser: Any) -> Generator[list[int]]:
    """Count the rows of a denoiser's calls inside the `with` statement.

    Args:
        denoiser: A network of diffusers. Rows that begin at a later block count in full.

    Yields:
        A list that grows by the rows of each call, and by those of the weakened network that join
            it.
    """
    rows: list[int] = []

    @torch.compiler.disable
    def count(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The picture is the first argument of all denoisers, whatever its name.
        rows.append(len(args[0] if args else next(iter(kwargs.values()))))

    hook = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with counting_joined(denoiser, rows):
            yield rows
    finally:
        hook.remove()
