"""Change what layers and blocks do during one pass, and restore them afterwards.

Attention is changed where a layer calls its kernel (see `attention`). A block is a layer with the
modules around it. It is left out, or gets its tokens in another order: its class is replaced by one
that does this. Compiled networks notice the new class.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import GuidanceError
from .attention import Operands, StandIn, standing_in, why_in_slices
from .families import Family, family_of, uncompiled
from .picture import PictureTokens


@dataclass(frozen=True)
class PictureOperands(Operands):
    """Operands of an attention kernel, and the picture's place in them (see `Operands`).

    Attributes:
        picture: The queries and positions of the picture; all others are text, or a picture that is
            not denoised.
        grid: Rows and columns of the picture's positions.
    """

    picture: slice
    grid: tuple[int, int]

    @property
    def has_picture_only(self) -> bool:
        """Whether all positions are the picture's."""
        return self.grid[0] * self.grid[1] == self.key.shape[-2]

    def attention(self, query: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(Q K^T * scale + bias) V, with a query and bias of the same shapes as before."""
        return F.scaled_dot_product_attention(
            query, self.key, self.value, attn_mask=bias, scale=self.scale
        )


Weaken = Callable[[PictureOperands, Callable[[], Tensor]], Tensor]
"""A replacement of a kernel: takes its operands and the kernel itself, and returns a result."""


@contextmanager
def attending_by(
    denoiser: nn.Module, layer: str, tokens: PictureTokens, weaken: Weaken, joined: int = 0
) -> Generator[StandIn]:
    """Run `weaken` instead of a layer's kernels inside the `with` statement.

    Args:
        denoiser: The network.
        layer: Dotted path of the layer.
        tokens: Where the picture's tokens are.
        weaken: What runs instead.
        joined: Number of the last rows, which alone are weakened; 0 is all rows.

    Raises:
        ValueError: During the pass, if the layer does not see the whole picture.
    """

    def attend(operands: Operands, kernel: Callable[[], Tensor]) -> Tensor:
        groups = tokens.groups()
        if len(groups) == 1:
            return weaken(_in_picture(operands, tokens), kernel)
        if len(operands.query) != len(groups):
            reason = why_in_slices() or "its processor changed the batch"
            raise GuidanceError(
                f"{layer!r} attends for {len(operands.query)} of {len(groups)} pictures: {reason}"
            )
        return torch.cat([_weakened(weaken, operands.rows(rows), own) for rows, own in groups])

    def attend_joined(operands: Operands, kernel: Callable[[], Tensor]) -> Tensor:
        usual, own = kernel(), slice(-joined, None)
        return torch.cat([usual[:-joined], attend(operands.rows(own), lambda: usual[own])])

    with standing_in(denoiser, layer, attend_joined if joined else attend) as stand_in:
        yield stand_in


def _in_picture(operands: Operands, tokens: PictureTokens) -> PictureOperands:
    picture, grid = tokens.at(operands.key.shape[-2])
    return PictureOperands(**vars(operands), picture=picture, grid=grid)


def _weakened(weaken: Weaken, operands: Operands, tokens: PictureTokens) -> Tensor:
    own = _in_picture(operands, tokens)
    return weaken(own, lambda: own.attention(own.query, own.bias))


Change = Callable[[Tensor], Tensor]
"""A function from a block's input tokens to those that it gets instead."""


class RunsForBlock(Protocol):
    """An object that runs instead of a block during one pass."""

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the block's output for its arguments."""
        ...


class BlockStandIn:
    """A replacement of a block during one pass.

    Attributes:
        was_called: Whether it ran.
    """

    def __init__(
        self, block: nn.Module, change: Change | None, family: Family, joined: int = 0
    ) -> None:
        """Apply `change` to the tokens before `block` runs; `None` leaves the block out.

        Only the last `joined` rows are changed; 0 is all rows.
        """
        self.was_called = False
        self._change, self._family, self._joined = change, family, joined
        self._forward: Any = type(block).forward
        # Code that moves weights between devices replaces the block's own `forward`.
        self._own: Any = vars(block).get("forward")
        self._names = block_parameters(type(block))
        self._thread = threading.get_ident()

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the block's output for its arguments."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        # Another thread may still be in a pass that began before this one (see `attention`).
        is_mine = torch.compiler.is_compiling() or threading.get_ident() == self._thread
        if not is_mine:
            return self._inner(block, given)
        self.was_called = True
        tokens = given[self._names[0]]
        if self._joined:
            return self._run_joined(block, given, tokens)
        if self._change is not None:
            return self._inner(block, {**given, self._names[0]: self._change(tokens)})
        if self._own is not None:  # it may fetch the weights of the next block
            self._inner(block, given)
        text = given.get("encoder_hidden_states") if self._family.joint is not None else None
        if text is None:
            return tokens
        return (text, tokens) if self._family.returned == "text_first" else (tokens, text)

    def _run_joined(self, block: nn.Module, given: dict[str, Any], tokens: Tensor) -> Tensor:
        usual, own = tokens[: -self._joined], tokens[-self._joined :]
        if self._change is None:
            return torch.cat([self._inner(block, given)[: -self._joined], own])
        changed = torch.cat([usual, self._change(own)])
        return self._inner(block, {**given, self._names[0]: changed})

    def _inner(self, block: nn.Module, given: dict[str, Any]) -> Any:
        if self._own is not None:
            return self._own(**given)
        return self._forward(block, **given)


@functools.cache
def block_parameters(block: type[nn.Module]) -> tuple[str, ...]:
    """Return the argument names of a block in order, the tokens first."""
    return tuple(inspect.signature(block.forward).parameters)[1:]


@functools.cache
def _stand_in_for(block: type[nn.Module]) -> type[nn.Module]:
    """Make the stand-in for a class of blocks; it is cached, so that it is compiled only once."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._stand_in.run(self, args, kwargs)

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Copy the block: after Ctrl-C, this may happen in the middle of a pass."""
        made: Any = object.__reduce_ex__(self, protocol)
        make, (_, *rest), state, *others = made
        kept = {name: value for name, value in state.items() if name != "_stand_in"}
        return make, (block, *rest), kept, *others

    members = {"forward": forward, "__reduce_ex__": reduced}
    return type(f"StandIn{block.__name__}", (block,), members)


@contextmanager
def changing_block(
    denoiser: nn.Module, path: str, change: Change | None, joined: int = 0
) -> Generator[BlockStandIn]:
    """Change a block's tokens inside the `with` statement, or leave it out if `change` is `None`.

    A block that is left out returns its input, including the text beside the picture. Only the last
    `joined` rows are changed; 0 is all rows.
    """
    block = uncompiled(denoiser).get_submodule(path)
    stand_in = BlockStandIn(block, change, family_of(denoiser), joined)
    with replacing_block(block, stand_in):
        yield stand_in


@contextmanager
def replacing_block(block: Any, stand_in: RunsForBlock) -> Generator[None]:
    """Run `stand_in` whenever a block is called inside the `with` statement."""
    cls, own = type(block), vars(block).get("forward")
    block._stand_in = stand_in
    vars(block).pop("forward", None)
    block.__class__ = _stand_in_for(cls)
    try:
        yield
    finally:
        block.__class__ = cls
        if own is not None:
            block.forward = own
        del block._stand_in


def reordered(states: Tensor, tokens: PictureTokens, orders: dict[int, Tensor]) -> Tensor:
    """Put the picture's tokens in a block's input into another order.

    Args:
        states: The input: (batch, tokens, channels), or a map (batch, channels, rows, columns).
        tokens: Where the picture's tokens are.
        orders: The order for each number of picture tokens: a permutation of their indices.
    """
    if states.ndim == 4:
        return states.flatten(2)[..., orders[states.shape[2] * states.shape[3]]].view_as(states)
    found: list[Tensor] = []
    for rows, own in tokens.groups():
        (picture, grid), given = own.at(states.shape[1]), states[rows]
        shuffled = given[:, picture][:, orders[grid[0] * grid[1]]]
        parts = [given[:, : picture.start], shuffled, given[:, picture.stop :]]
        found.append(torch.cat(parts, dim=1))
    return torch.cat(found) if len(found) > 1 else found[0]
