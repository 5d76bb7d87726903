"""The part of a network before its first weakened block, which is the same in both passes.

The weakened pass has the same x_t and condition as the first pass, so the blocks before its first
weakened layer would compute the same again. Their outputs are taken from the first pass instead:
the encoder if the mid block of a U-Net is weakened, k blocks if block k of a transformer is. The
result can differ only by rounding, if the batch of the first pass had more rows.

Few outputs of a transformer's blocks are kept. An output is needed if the network itself still held
it when the first weakened block began (skip connections), or if its block was the last one that ran
in its stack of blocks. A U-Net needs all of them.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .families import family_of, uncompiled
from .layers import block_names
from .safety import recomputes
from .weakening import block_parameters, replacing_block

# Packages whose networks pass values between blocks only in ways that are tested here.
_KNOWN = ("diffusers", "self_attention_guidance")

_stacks_of: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


class ShapesDiffer(Exception):
    """A block gets another number of tokens than in the first pass, so all must be computed."""


def blocks_before(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks of a denoiser that may be skipped if they run before any weakened layer.

    The list is empty for networks that are compiled, have an unknown forward or use gradient
    checkpointing. It is also empty if something moves the weights, replaces the forward of a module
    or has hooks on a block, because its effect is unknown.
    """
    network: Any = uncompiled(denoiser)
    is_compiled = network is not denoiser or network._compiled_call_impl is not None
    is_known = type(network).forward.__module__.partition(".")[0] in _KNOWN
    if is_compiled or not is_known:
        return []
    if recomputes(network):
        return []
    found = [getattr(network, stack, None) for stack in _stacks(network)]
    blocks = [block for stack in found if isinstance(stack, nn.ModuleList) for block in stack]
    return blocks if all(map(_is_plain, blocks)) else []


def _stacks(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the lists of blocks that see the picture; they are cached."""
    if family_of(network).tokens == "levels":
        return ("down_blocks",)
    if network not in _stacks_of:
        found = dict.fromkeys(path.partition(".")[0] for path in block_names(network))
        _stacks_of[network] = tuple(found)
    return _stacks_of[network]


def _is_plain(block: nn.Module) -> bool:
    has_hooks = bool(block._forward_hooks or block._forward_pre_hooks)
    return not has_hooks and not any(
        "forward" in vars(module) or module._compiled_call_impl is not None
        for module in block.modules()
    )


def part_of(network: nn.Module, path: str) -> nn.Module:
    """Return the block that holds the layer at a path, or its top module if that is no list."""
    first, _, rest = path.partition(".")
    part = network.get_submodule(first)
    return part[int(rest.partition(".")[0])] if isinstance(part, nn.ModuleList) else part


class _Output:
    """A tensor that a block returned; it is dropped once it is not needed."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._version = None if tensor.is_inference() else tensor._version
        self._weak = weakref.ref(tensor)
        self._kept: Tensor | None = tensor
        self._is_needed = False

    def release(self) -> None:
        """Drop the tensor if it is not needed; called when the next block of the stack has run."""
        self._kept = self._kept if self._is_needed else None

    def take(self) -> None:
        """Keep the tensor if the network still holds it; called when the weakened part begins."""
        self._kept = self._weak() if self._kept is None else self._kept
        self._is_needed = self._kept is not None

    @property
    def is_unchanged(self) -> bool:
        """Whether the tensor was not changed in place since, by torch's version counter.

        Tensors of `torch.inference_mode` have no such counter, so they may have changed.
        """
        kept = self._kept
        return kept is None or (self._version is not None and kept._version == self._version)

    def rows(self, rows: slice) -> Tensor:
        """Return some rows; NaN for a dropped tensor, so that a use of it by mistake would show."""
        if self._kept is not None:
            return self._kept[rows]
        shape = (len(range(self.shape[0])[rows]), *self.shape[1:])
        return torch.full(shape, math.nan, dtype=self._dtype, device=self._device)


def _noted(part: Any) -> Any:
    return _Output(part) if isinstance(part, Tensor) else part


def _replayed(part: Any, rows: slice) -> Any:
    return part.rows(rows) if isinstance(part, _Output) else part


class _Noted:
    """A block with the shapes of its inputs, and its output."""

    def __init__(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.block, self._names = block, block_parameters(type(block))
        self._shapes = self._shapes_of(args, kwargs)
        self._output = tree_map(_noted, output)
        leaves: list[Any] = tree_leaves(self._output)
        self.outputs = [leaf for leaf in leaves if isinstance(leaf, _Output)]

    def replayed(self, rows: slice) -> Any:
        return tree_map(functools.partial(_replayed, rows=rows), self._output)

    def fits(self, args: Any, kwargs: Any) -> bool:
        """Whether the block's inputs have the shapes of the first pass, except for the batch."""
        shapes = self._shapes_of(args, kwargs)
        return all(self._shapes.get(name, shape) == shape for name, shape in shapes.items())

    def _shapes_of(self, args: Any, kwargs: Any) -> dict[str, torch.Size]:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return {name: each.shape[1:] for name, each in given.items() if isinstance(each, Tensor)}


class Prefix:
    """Outputs of blocks in the first pass of a call, for the weakened passes of the same call."""

    def __init__(self, network: nn.Module) -> None:
        """Start without any outputs."""
        self._network = network
        self._noted: list[_Noted] = []
        self._before: dict[tuple[str, ...], list[_Noted]] = {}
        self._thread = threading.get_ident()

    @contextmanager
    def noting(
        self, blocks: Sequence[nn.Module], weak: Iterable[tuple[str, ...]]
    ) -> Generator[None]:
        """Record, inside the `with` statement, the outputs of blocks before each set of layers.

        Args:
            blocks: The blocks that `blocks_before` returned.
            weak: For each guidance, the dotted paths of the layers or blocks that it weakens.
        """
        is_lean = family_of(self._network).tokens != "levels"
        stacks = {child: stack for stack in self._network.children() for child in stack.children()}
        latest: dict[nn.Module, _Noted] = {}

        def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            stack = stacks[block]
            for part in latest[stack].outputs if is_lean and stack in latest else ():
                part.release()
            latest[stack] = _Noted(block, args, kwargs, output)
            self._noted.append(latest[stack])

        def begins(layers: tuple[str, ...], *_: Any) -> None:
            if threading.get_ident() != self._thread or layers in self._before:
                return
            self._before[layers] = list(self._noted)
            for noted in self._noted:
                for part in noted.outputs:
                    part.take()

        with ExitStack() as undo:
            for block in blocks:
                hook = block.register_forward_hook(note, with_kwargs=True)
                undo.callback(hook.remove)
            for layers in weak:
                for part in {part_of(self._network, path) for path in layers}:
                    hook = part.register_forward_pre_hook(functools.partial(begins, layers))
                    undo.callback(hook.remove)
            yield

    @contextmanager
    def reused(self, weak: tuple[str, ...], batch: int, rows: slice) -> Generator[None]:
        """Let blocks before weakened layers return their recorded outputs, for rows of the batch.

        Raises:
            ShapesDiffer: During the pass, before any of the layers: run it again without this.
        """
        before = self._before.get(weak, [])
        calls = Counter(noted.block for noted in self._noted)
        outputs = [output for noted in before for output in noted.outputs]
        is_known = all(calls[noted.block] == 1 for noted in before) and all(
            output.is_unchanged and output.shape[:1] == (batch,) for output in outputs
        )
        with ExitStack() as stack:
            for noted in before if is_known else ():
                stack.enter_context(replacing_block(noted.block, _Known(noted, rows)))
            yield


class _Known:
    """Runs instead of a block whose output is known."""

    def __init__(self, noted: _Noted, rows: slice) -> None:
        self._noted, self._rows = noted, rows

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._noted.fits(args, kwargs):
            raise ShapesDiffer
        return self._noted.replayed(self._rows)
