"""Read the queries and keys of one attention layer while it runs."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .maths import attention_received


@dataclass(frozen=True)
class Scores:
    """Operands of one call that computes attention scores.

    Attributes:
        query: Shape (..., queries, channels).
        key: Shape (..., positions, channels).
        scale: Factor of the scores; `None` is 1 / sqrt(channels).
        bias: Added to the scores, or where they count if bool; `None` if there is none.
    """

    query: Tensor
    key: Tensor
    scale: float | None
    bias: Tensor | None = None


class _ScoreReader(TorchFunctionMode):
    """Notes the operands of attention kernels, and lets every call through unchanged."""

    def __init__(self, scores: list[Scores]) -> None:
        super().__init__()
        self.scores = scores

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.scores.append(Scores(query, key, kwargs.get("scale"), bias))
        elif func is torch.baddbmm:  # how sliced attention computes its scores
            self.scores.append(Scores(args[1], args[2].transpose(-1, -2), kwargs.get("alpha", 1)))
        if args and func is torch.Tensor.unflatten:  # torch.compile traces it as a method only
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


class _ReadingProcessor:
    """Stands in for a layer's attention processor during one forward pass."""

    def __init__(self, processor: Any, scores: list[Scores]) -> None:
        self.processor = processor
        self.scores = scores
        self.thread = threading.get_ident()

    def is_foreign(self) -> bool:
        """Whether another thread is in a pass that it began before this layer was read."""
        # Compiled passes can't ask; that they read one pass too many is noticed by its rows.
        return not torch.compiler.is_compiling() and threading.get_ident() != self.thread


@functools.cache
def _reading_class(processor: type) -> type[_ReadingProcessor]:
    """The reading processor for processors of one class.

    diffusers drops every keyword that is not in the signature of a processor's `__call__`, so it
    must show that of the processor it stands in for. One class for each, always the same:
    torch.compile compiles anew for a class that it has not seen, but not for an object.
    """

    def call(self: _ReadingProcessor, attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.is_foreign():
            return self.processor(attention, *args, **kwargs)
        with _ScoreReader(self.scores):
            return self.processor(attention, *args, **kwargs)

    # What else is known of the processor's own call, such as that it is not compiled, is not true
    # of this one.
    functools.update_wrapper(call, processor.__call__, assigned=(), updated=())
    return type(f"Reading{processor.__name__}", (_ReadingProcessor,), {"__call__": call})


class AttentionCapture:
    """Reads one layer's queries and keys between `start` and `stop`.

    The layer's processor is replaced only in between, by one that calls it, so that outputs stay
    bit-equal, processors may be changed at any other time, and compiled modules notice.
    """

    def __init__(self, attention: nn.Module) -> None:
        """Prepare to read `attention`, a layer as `self_attention` returns it."""
        self._attention: Any = attention
        self._processor: Any = None
        self._scores: list[Scores] = []

    def start(self) -> None:
        """Begin reading; what an interrupted pass left behind is undone first."""
        self.stop()
        self._processor = self._attention.processor
        reading = _reading_class(type(self._processor))
        self._attention.set_processor(reading(self._processor, self._scores))

    def stop(self) -> list[Scores]:
        """Restore the layer; idempotent.

        Returns:
            What was read since `start`.
        """
        if self._processor is not None:
            self._attention.set_processor(self._processor)
        scores, self._processor, self._scores = self._scores, None, []
        return scores


def received(scores: list[Scores], batch: int, rows: slice, picture: slice | None = None) -> Tensor:
    """The attention that each position received (see `maths.attention_received`).

    Args:
        scores: What `AttentionCapture.stop` returned; not empty.
        batch: Batch size of the pass that was read.
        rows: The part of the batch that is wanted.
        picture: The positions that are wanted; `None` is all.

    Returns:
        Shape (rows, positions), float32.

    Raises:
        RuntimeError: The layer attended for another number of rows than the batch has.
    """
    by_row = scores[0].query.ndim == 4
    found = sum(len(score.query) for score in scores)
    if found != batch if by_row else found % batch:
        raise RuntimeError(
            f"attention was recorded for {found} {'' if by_row else 'heads '}of {batch} rows: "
            "another processor changed the batch; use diffusers' default processor at this layer"
        )
    query = _joined([score.query.flatten(0, -3) for score in scores])
    key = _joined([score.key.flatten(0, -3) for score in scores])
    query, key = (side.unflatten(0, (batch, -1))[rows] for side in (query, key))
    return attention_received(query, key, scores[0].scale, _bias(scores, rows), picture)


def _joined(parts: list[Tensor]) -> Tensor:
    # Of one tensor, too, torch.cat makes a copy.
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bias(scores: list[Scores], rows: slice) -> Tensor | None:
    """What is added to the scores of the wanted rows, (rows, heads or 1, queries or 1, keys)."""
    parts: list[Tensor] = []
    for score in scores:
        if score.bias is None:
            return None
        bias = score.bias[(None,) * (4 - score.bias.ndim)]
        parts.append(bias.expand(len(score.query), -1, -1, -1))
    return torch.cat(parts)[rows]


def self_attention(denoiser: nn.Module, layer: str) -> nn.Module:
    """The self-attention layer at a dotted path.

    Args:
        denoiser: The module that holds the layer, not compiled.
        layer: Dotted path.

    Raises:
        ValueError: There is no self-attention layer of that name; lists those that there are.
    """
    try:
        module = denoiser.get_submodule(layer)
    except AttributeError:
        module = None
    if module is not None and _is_self_attention(module):
        return module
    layers = [name for name, other in denoiser.named_modules() if _is_self_attention(other)]
    raise ValueError(
        f"layer {layer!r} is not a self-attention layer of {type(denoiser).__name__}; "
        f"it must be one of {', '.join(layers) or '(there is none)'}"
    )


def _is_self_attention(module: nn.Module) -> bool:
    return hasattr(module, "set_processor") and not getattr(module, "is_cross_attention", False)


def token_grid(positions: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of `positions` tokens that cover a sample, found by halving its sides.

    Args:
        positions: Number of tokens.
        height: Height of the denoiser's input.
        width: Width of the denoiser's input.

    Raises:
        ValueError: No halving of the sample, rounded up or down, has so many tokens.
    """
    for rounded in (math.ceil, math.floor):
        factor = 1
        while True:
            rows, columns = max(rounded(height / factor), 1), max(rounded(width / factor), 1)
            if rows * columns == positions:
                return rows, columns
            if rows * columns == 1:
                break
            factor *= 2
    raise ValueError(f"{positions} attention tokens do not form a grid over {height} x {width}")
