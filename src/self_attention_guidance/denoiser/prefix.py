"""What a U-Net computes before its first weakened block, which is the same in both passes.

The weakened pass sees the same x_t and condition as the first one, so that the down blocks before
its first weakened layer would compute again what they did. It takes their outputs from the first
pass instead: for the mid block, that is the encoder. Where the batch of the first pass has more
rows, these round differently, and nothing else does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .families import family_of, uncompiled
from .weakening import replacing_block


def blocks_before(denoiser: nn.Module, weak: Sequence[str]) -> list[nn.Module]:
    """The blocks of a denoiser that run before the first of some layers, and may be left out.

    None in other networks than U-Nets, in compiled ones, and where something moves the weights or
    has replaced the forward of a module: what it does is not known here.
    """
    network: Any = uncompiled(denoiser)
    down: list[nn.Module] = list(getattr(network, "down_blocks", ()))
    is_compiled = network is not denoiser or network._compiled_call_impl is not None
    if is_compiled or family_of(denoiser).tokens != "levels":
        return []
    numbers = [int(path.split(".")[1]) for path in weak if path.startswith("down_blocks.")]
    before = down[: min(numbers, default=len(down))]
    return before if all(map(_is_plain, before)) else []


def _is_plain(block: nn.Module) -> bool:
    return not any(
        "forward" in vars(module) or module._compiled_call_impl is not None
        for module in block.modules()
    )


class Prefix:
    """The outputs of blocks in the first pass of a call, for weakened passes of the same call."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._outputs: dict[nn.Module, Any] = {}
        self._thread = threading.get_ident()

    @contextmanager
    def noting(self, blocks: Iterable[nn.Module]) -> Generator[None]:
        """Note what blocks return inside the `with` statement."""

        def note(block: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == self._thread:
                self._outputs[block] = output

        hooks = [block.register_forward_hook(note) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def reused(self, blocks: Sequence[nn.Module], rows: slice) -> Generator[None]:
        """Let blocks return what they did, for some rows, inside the `with` statement."""
        known = all(block in self._outputs for block in blocks)
        with ExitStack() as stack:
            for block in blocks if known else ():
                output = tree_map(functools.partial(_cut, rows=rows), self._outputs[block])
                stack.enter_context(replacing_block(block, _Known(output)))
            yield


def _cut(part: Any, rows: slice) -> Any:
    return part[rows] if isinstance(part, Tensor) else part


class _Known:
    """A block whose output is known."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._output
