"""How much a network was asked for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def counted_rows(denoiser: Any) -> Generator[list[int]]:
    """Counts the rows of a denoiser's calls inside the `with` statement.

    Args:
        denoiser: A network of diffusers. Passes that begin at a later block count in full.

    Yields:
        The rows of each call, as they come.
    """
    rows: list[int] = []

    @torch.compiler.disable
    def count(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The picture is the first argument of all denoisers, whatever they call it.
        rows.append(len(args[0] if args else next(iter(kwargs.values()))))

    hook = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()
