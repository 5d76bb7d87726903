"""Read attention layers while they run, and weaken them.

Both happen where a layer calls its kernel, beside the processor that calls it: one way serves
U-Nets, joint attention and rotary embeddings alike.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..maths import attention_received
from .protocols import uncompiled

# Torch's own kernel, also where `torch.nn.functional` holds a wrapper of it.
_KERNEL: Any = torch._C._nn.scaled_dot_product_attention

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What a layer computes of queries, keys and values, with its own mask and scale."""


class Attend(Protocol):
    """What a weakened layer computes in place of its own attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        """Attend.

        Args:
            query: Shape (..., queries, channels).
            key: Shape (..., positions, channels).
            value: Shape (..., positions, channels).
            kernel: The layer's own attention.

        Returns:
            Shape of `query`.
        """
        ...


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


class _KernelCalls(TorchFunctionMode):
    """Sees calls of attention kernels; all other calls pass."""

    def kernel(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the fused kernel."""
        return func(*args, **kwargs)

    def scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """How attention without it, whole or in slices, computes its scores."""
        return func(*args, **kwargs)

    def values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """And how it applies them."""
        return func(*args, **kwargs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _KERNEL:
            return self.kernel(func, args, kwargs)
        if func is torch.baddbmm:
            return self.scores(func, args, kwargs)
        if func is torch.bmm:
            return self.values(func, args, kwargs)
        if args and func is torch.Tensor.unflatten:  # torch.compile traces it as a method only
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


class _Reader(_KernelCalls):
    """Notes the operands of attention kernels."""

    def __init__(self, noted: list[Scores]) -> None:
        super().__init__()
        self.noted = noted

    def kernel(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query = args[0] if args else kwargs["query"]
        key = args[1] if len(args) > 1 else kwargs["key"]
        bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        self.noted.append(Scores(query, key, kwargs.get("scale"), bias))
        return func(*args, **kwargs)

    def scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = args[0] if kwargs.get("beta", 1) else None
        scale = kwargs.get("alpha", 1)
        self.noted.append(Scores(args[1], args[2].transpose(-1, -2), scale, bias))
        return func(*args, **kwargs)


class _Weakener(_KernelCalls):
    """Computes another attention in place of the layer's own."""

    def __init__(self, attend: Attend, weakened: list[int]) -> None:
        super().__init__()
        self.attend = attend
        self.weakened = weakened
        self.sides: Any = None

    def kernel(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value")
        sides = [args[i] if len(args) > i else kwargs[name] for i, name in enumerate(names)]
        rest = {name: value for name, value in kwargs.items() if name not in names}

        def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return func(query, key, value, *args[3:], **rest)

        self.weakened.append(1)
        return self.attend(sides[0], sides[1], sides[2], own)

    def scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.sides = (args[0], args[1], args[2].transpose(-1, -2), kwargs)
        return func(*args, **kwargs)

    def values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.sides is None:
            return func(*args, **kwargs)
        bias, query, key, settings = self.sides
        self.sides = None

        def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = torch.baddbmm(bias, query, key.transpose(-1, -2), **settings)
            return torch.bmm(scores.softmax(dim=-1).to(value.dtype), value)

        self.weakened.append(1)
        return self.attend(query, key, args[1], own)


class _StandIn:
    """Stands in for a layer's attention processor during one forward pass."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.thread = threading.get_ident()

    def mode(self) -> TorchFunctionMode:
        """What sees the kernel's calls."""
        raise NotImplementedError

    def is_foreign(self) -> bool:
        """Whether another thread is in a pass that it began before this one."""
        # Compiled passes can't ask; that they read one pass too many is noticed by its rows.
        return not torch.compiler.is_compiling() and threading.get_ident() != self.thread


class _Reading(_StandIn):
    def __init__(self, processor: Any, noted: list[Scores]) -> None:
        super().__init__(processor)
        self.noted = noted

    def mode(self) -> TorchFunctionMode:
        return _Reader(self.noted)


class _Weak(_StandIn):
    def __init__(self, processor: Any, attend: Attend, weakened: list[int]) -> None:
        super().__init__(processor)
        self.attend = attend
        self.weakened = weakened

    def mode(self) -> TorchFunctionMode:
        return _Weakener(self.attend, self.weakened)


@functools.cache
def _standing_in(kind: type[_StandIn], processor: type) -> Callable[..., _StandIn]:
    """The class that stands in for processors of one class.

    diffusers drops every keyword that is not in the signature of a processor's `__call__`, so it
    must show that of the processor it stands in for. One class for each, always the same:
    torch.compile compiles anew for a class that it has not seen, but not for an object.
    """

    def call(self: _StandIn, attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.is_foreign():
            return self.processor(attention, *args, **kwargs)
        with self.mode():
            return self.processor(attention, *args, **kwargs)

    # What else is known of the processor's own call, such as that it is not compiled, is not true
    # of this one.
    functools.update_wrapper(call, processor.__call__, assigned=(), updated=())
    return type(f"{kind.__name__}{processor.__name__}", (kind,), {"__call__": call})


class AttentionCapture:
    """Reads one layer's queries and keys between `start` and `stop`.

    The layer's processor is replaced only in between, by one that calls it, so that outputs stay
    bit-equal, processors may be changed at any other time, and compiled modules notice.
    """

    def __init__(self, attention: nn.Module) -> None:
        """Prepare to read `attention`, a layer as `self_attention` returns it."""
        self._attention: Any = attention
        self._processor: Any = None
        self._noted: list[Scores] = []

    def start(self) -> None:
        """Begin reading."""
        self._processor = self._attention.processor
        reading = _standing_in(_Reading, type(self._processor))
        self._attention.set_processor(reading(self._processor, self._noted))

    def stop(self) -> list[Scores]:
        """Restore the layer; idempotent.

        Returns:
            What was read since `start`.
        """
        if self._processor is not None:
            self._attention.set_processor(self._processor)
        noted, self._processor, self._noted = self._noted, None, []
        return noted


@contextmanager
def attending(denoiser: nn.Module, layers: Sequence[str], attend: Attend) -> Generator[None]:
    """Let layers compute another attention inside the `with` statement.

    Args:
        denoiser: The module that holds the layers, compiled or not.
        layers: Dotted paths.
        attend: What they compute.

    Raises:
        ValueError: There is no self-attention layer of that name.
        RuntimeError: A layer ran, but its attention could not be changed, or it did not run.
    """
    modules: list[Any] = [self_attention(denoiser, layer) for layer in layers]
    processors = [module.processor for module in modules]
    weakened: list[list[int]] = [[] for _ in modules]
    try:
        for module, processor, count in zip(modules, processors, weakened, strict=True):
            weak = _standing_in(_Weak, type(processor))
            module.set_processor(weak(processor, attend, count))
        yield
    finally:
        for module, processor in zip(modules, processors, strict=True):
            module.set_processor(processor)
    for layer, module, count in zip(layers, modules, weakened, strict=True):
        if not count:
            raise RuntimeError(f"no attention was weakened at {layer!r}: {why_unseen(module)}")


def why_unseen(attention: Any) -> str:
    """Why a layer's attention could not be read or changed, and what to do."""
    processor = attention.processor
    name = type(processor).__name__
    backend = getattr(processor, "_attention_backend", None)
    if backend is not None:
        backend = getattr(backend, "value", backend)
        return (
            f"its attention backend {backend!r} does not call torch's kernel; call "
            "set_attention_backend('native')"
        )
    if "XFormers" in name:
        return (
            f"its processor {name} does not call torch's kernel; call "
            "disable_xformers_memory_efficient_attention()"
        )
    if F.scaled_dot_product_attention is not _KERNEL:
        return (
            "torch.nn.functional.scaled_dot_product_attention was replaced by "
            f"{getattr(F.scaled_dot_product_attention, '__qualname__', 'another kernel')}, which "
            "does not call torch's own"
        )
    return (
        f"the layer did not run, or its processor {name} uses a kernel that can't be read; use "
        "diffusers' default processor there, and if the denoiser was compiled and run before "
        "guidance was attached, call torch.compiler.reset() first"
    )


def received(noted: list[Scores], batch: int, rows: slice, picture: slice | None = None) -> Tensor:
    """The attention that each position received (see `maths.attention_received`).

    Args:
        noted: What `AttentionCapture.stop` returned; not empty.
        batch: Batch size of the pass that was read.
        rows: The part of the batch that is wanted.
        picture: The positions that are wanted; `None` is all.

    Returns:
        Shape (rows, positions), float32.

    Raises:
        RuntimeError: The layer attended for another number of rows than the batch has.
    """
    # Image prompts are attended to in a call of their own.
    noted = [scores for scores in noted if scores.key.shape[-2] == noted[0].key.shape[-2]]
    by_row = noted[0].query.ndim == 4
    found = sum(len(scores.query) for scores in noted)
    if found != batch if by_row else found % batch:
        raise RuntimeError(
            f"attention was recorded for {found} {'' if by_row else 'heads '}of {batch} rows: "
            "another processor changed the batch; use diffusers' default processor at this layer"
        )
    sides = (
        _joined([side.flatten(0, -3) for side in parts]).unflatten(0, (batch, -1))[rows]
        for parts in zip(*((scores.query, scores.key) for scores in noted), strict=True)
    )
    query, key = sides
    bias = _bias(noted, batch)
    bias = None if bias is None else bias[rows]
    return attention_received(query, key, noted[0].scale, bias, picture)


def _joined(parts: list[Tensor]) -> Tensor:
    # Of one tensor, too, torch.cat makes a copy.
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bias(noted: list[Scores], batch: int) -> Tensor | None:
    """What is added to the scores, (rows, heads or 1, queries or 1, keys)."""
    parts: list[Tensor] = []
    for scores in noted:
        if scores.bias is None:
            return None
        if scores.query.ndim == 4:
            bias = scores.bias[(None,) * (4 - scores.bias.ndim)]
            parts.append(bias.expand(len(scores.query), -1, -1, -1))
        else:
            bias = scores.bias[(None,) * (3 - scores.bias.ndim)]
            parts.append(bias.expand(len(scores.query), -1, -1))
    joined = torch.cat(parts)
    return joined if joined.ndim == 4 else joined.unflatten(0, (batch, -1))


def self_attention(denoiser: nn.Module, layer: str) -> nn.Module:
    """The self-attention layer at a dotted path.

    Args:
        denoiser: The module that holds the layer, compiled or not.
        layer: Dotted path.

    Raises:
        ValueError: There is no self-attention layer of that name; lists those that there are.
    """
    denoiser = uncompiled(denoiser)
    try:
        module = denoiser.get_submodule(layer)
    except AttributeError:
        module = None
    if module is not None and _is_self_attention(module):
        return module
    layers = self_attention_layers(denoiser)
    raise ValueError(
        f"layer {layer!r} is not a self-attention layer of {type(denoiser).__name__}; "
        f"it must be one of {', '.join(layers) or '(there is none)'}"
    )


def self_attention_layers(denoiser: nn.Module) -> list[str]:
    """Dotted paths of all self-attention layers of a denoiser, compiled or not."""
    modules = uncompiled(denoiser).named_modules()
    return [name for name, module in modules if _is_self_attention(module)]


def _is_self_attention(module: nn.Module) -> bool:
    return hasattr(module, "set_processor") and not getattr(module, "is_cross_attention", False)
