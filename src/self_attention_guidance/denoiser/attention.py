"""Read attention layers while they run, and weaken them.

Both happen where a layer's processor calls its kernel, so U-Nets, joint attention and rotary
embeddings need no special code.
"""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import GuidanceError
from ..maths import attention_received
from .families import uncompiled

# Torch's own kernel, even if `torch.nn.functional` holds a wrapper of it.
_KERNEL: Any = torch._C._nn.scaled_dot_product_attention  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Operands:
    """Operands of one call of an attention kernel."""

    query: Tensor  # (..., queries, channels); the first axes are rows and heads, or their product
    key: Tensor  # (..., positions, channels)
    value: Tensor  # (..., positions, channels)
    scale: float | None  # factor of the scores; `None` is 1 / sqrt(channels)
    bias: Tensor | None  # added to the scores; if bool, true where scores are used

    def rows(self, rows: slice) -> Operands:
        """Return the operands of some rows; rows and heads must be two axes."""
        is_whole = self.bias is None or self.bias.ndim < 4 or len(self.bias) == 1
        bias = self.bias if self.bias is None or is_whole else self.bias[rows]
        return replace(
            self, query=self.query[rows], key=self.key[rows], value=self.value[rows], bias=bias
        )


Attend = Callable[[Operands, Callable[[], Tensor]], Tensor]
"""A replacement of a kernel: takes its operands and the kernel itself, and returns a result."""


class _KernelCalls(TorchFunctionMode):
    """Calls a function instead of attention kernels; all other calls stay as they are."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.scores: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = None
        if func is _KERNEL:
            names = ("query", "key", "value", "attn_mask")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            query, key, value = given["query"], given["key"], given["value"]
            operands = Operands(query, key, value, given.get("scale"), given.get("attn_mask"))
        # Attention without the fused kernel, sliced or not: first the scores, then `torch.bmm`.
        elif func is torch.baddbmm:
            bias = args[0] if kwargs.get("beta", 1) else None
            self.scores = (args[1], args[2].transpose(-1, -2), kwargs.get("alpha", 1), bias)
        elif func is torch.bmm and self.scores is not None:
            query, key, scale, bias = self.scores
            if args[0].shape == (*query.shape[:-1], key.shape[-2]):
                operands, self.scores = Operands(query, key, args[1], scale, bias), None
        elif args and func is torch.Tensor.unflatten:  # torch.compile traces it as a method only
            return args[0].unflatten(*args[1:], **kwargs)
        if operands is None:
            return func(*args, **kwargs)
        return self.attend(operands, lambda: func(*args, **kwargs))


class StandIn:
    """Stands in for a layer's attention processor during one forward pass.

    When the layer calls its kernel, `attend` runs instead. Without `attend`, the kernel runs, and
    its operands are recorded in `noted`.

    Attributes:
        noted: The operands of all calls of the kernel.
        was_called: Whether `attend` ran.
    """

    def __init__(self, layer: str, processor: Any, attend: Attend | None) -> None:
        self.noted: list[Operands] = []
        self.was_called = False
        self._layer, self._processor, self._attend = layer, processor, attend
        self._thread = threading.get_ident()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the processor: after Ctrl-C, a network may be copied in the middle of a pass."""
        return copy.deepcopy(self._processor, memo)

    def _kernel(
        self, tokens: int | None, operands: Operands, kernel: Callable[[], Tensor]
    ) -> Tensor:
        queries, positions = operands.query.shape[-2], operands.key.shape[-2]
        if queries == positions and tokens not in (None, queries):
            raise ValueError(merged_tokens(self._layer, positions, f"it gets {tokens} tokens"))
        if self._attend is None:
            self.noted.append(operands)
            return kernel()
        # Attention to image prompts is a separate call.
        if queries != positions:
            return kernel()
        self.was_called = True
        return self._attend(operands, kernel)


@functools.cache
def _stand_in_for(processor: type) -> type[StandIn]:
    """Make the class that stands in for processors of one class.

    diffusers drops every keyword that is not in the signature of a processor's `__call__`, so the
    stand-in has the same signature. It is cached: torch.compile compiles again for each new class.
    """

    def call(self: StandIn, attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Another thread may still be in an earlier pass. Compiled code can't check this; if it
        # records an extra call, `received` refuses the number of rows.
        is_mine = torch.compiler.is_compiling() or threading.get_ident() == self._thread
        kernel = functools.partial(self._kernel, _tokens(*args, **kwargs))
        with _KernelCalls(kernel) if is_mine else nullcontext():
            return self._processor(attention, *args, **kwargs)

    # Copy only the signature. Other attributes, such as "do not compile", are wrong for `call`.
    functools.update_wrapper(call, processor.__call__, assigned=(), updated=())
    return type(f"StandIn{processor.__name__}", (StandIn,), {"__call__": call})


def _tokens(
    hidden_states: Any = None, encoder_hidden_states: Any = None, *_: Any, **__: Any
) -> int | None:
    """Count the tokens that a processor gets, text included; `None` if it gets no states."""
    has_text = encoder_hidden_states is not None and encoder_hidden_states is not hidden_states
    given: list[Any] = [hidden_states, encoder_hidden_states] if has_text else [hidden_states]
    if not all(isinstance(states, Tensor) for states in given):
        return None
    # A map, (batch, channels, height, width), has a token for each of its pixels.
    return sum(
        math.prod(states.shape[2:] if states.ndim == 4 else states.shape[1:2]) for states in given
    )


def merged_tokens(layer: str, positions: int, given: str) -> str:
    """Say that a layer attends over other tokens than it should, and what may be the reason."""
    return (
        f"{layer!r} attends over {positions} positions, but {given}: code that merges or drops "
        "tokens (such as tomesd) is not supported"
    )


@contextmanager
def standing_in(
    denoiser: nn.Module, layer: str, attend: Attend | None = None
) -> Generator[StandIn]:
    """Run `attend` instead of a layer's kernels inside the `with` statement, or record operands.

    The layer's processor is replaced only there. After Ctrl-C in the network's own pass, the
    statement ends with the next call; a processor that was set meanwhile stays.
    """
    attention: Any = self_attention(denoiser, layer)
    processor = attention.processor
    stand_in = _stand_in_for(type(processor))(layer, processor, attend)
    attention.set_processor(stand_in)
    try:
        yield stand_in
    finally:
        if attention.processor is stand_in:
            attention.set_processor(processor)


def why_unseen(denoiser: nn.Module, layer: str) -> str:
    """Explain why a layer's attention could not be read or changed, and what to do."""
    processor: Any = self_attention(denoiser, layer).processor
    name, backend = type(processor).__name__, getattr(processor, "_attention_backend", None)
    unlike = "does not call torch's kernel; call"
    if backend is not None:
        backend = str(getattr(backend, "value", backend))
        return f"its attention backend {backend!r} {unlike} set_attention_backend('native')"
    if "XFormers" in name:
        return f"its {name} {unlike} disable_xformers_memory_efficient_attention()"
    return why_in_slices() or (
        f"the layer did not run, or its {name} uses a kernel that can't be read; use diffusers' "
        "default processor there, and if the denoiser was compiled and run before guidance was "
        "attached, call torch.compiler.reset() first"
    )


def why_in_slices() -> str | None:
    """Name the wrapper of torch's kernel that may call it in slices, and what to do."""
    wrapper = F.scaled_dot_product_attention
    if wrapper is _KERNEL:
        return None
    by = getattr(wrapper, "__qualname__", wrapper)
    return f"torch.nn.functional.scaled_dot_product_attention was replaced by {by}; undo that"


def received(noted: list[Operands], batch: int, rows: slice, picture: slice) -> Tensor:
    """Compute the attention that picture positions received in a layer, for part of the batch."""
    # Attention to image prompts is a separate call.
    positions = noted[0].key.shape[-2]
    noted = [each for each in noted if each.key.shape[-2] == positions]
    by_row = noted[0].query.ndim == 4
    found = sum(len(each.query) for each in noted)
    if found != batch if by_row else found % batch:
        reason = "the processor changed the batch; use diffusers' default one at this layer"
        raise GuidanceError(
            f"attention was recorded for {found} {'' if by_row else 'heads '}of {batch} rows: "
            f"{why_in_slices() or reason}"
        )

    def joined(parts: list[Tensor]) -> Tensor:
        # torch.cat copies even a single tensor.
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole if by_row else whole.unflatten(0, (batch, -1)))[rows]

    query, key = joined([each.query for each in noted]), joined([each.key for each in noted])
    bias = None
    if any(each.bias is not None for each in noted):
        biases = [_added(each) for each in noted]
        inner = torch.broadcast_shapes(*(each.shape[1:] for each in biases))
        parts = zip(noted, biases, strict=True)
        bias = joined([added.expand(len(call.query), *inner) for call, added in parts])
    part = None if picture == slice(0, positions) else picture
    return attention_received(query, key, noted[0].scale, bias, part)


def _added(call: Operands) -> Tensor:
    """Return the bias of the scores as a float tensor with the scores' number of dimensions."""
    bias = call.query.new_zeros(()) if call.bias is None else call.bias
    if bias.dtype == torch.bool:
        bias = torch.where(bias, 0.0, -torch.inf)
    return bias[(None,) * (call.query.ndim - bias.ndim)]


def self_attention(denoiser: nn.Module, layer: str) -> nn.Module:
    """Return the self-attention layer at a dotted path of a denoiser, compiled or not."""
    with suppress(AttributeError):
        module = uncompiled(denoiser).get_submodule(layer)
        if _is_self_attention(module):
            return module
    name, layers = type(uncompiled(denoiser)).__name__, self_attention_layers(denoiser)
    if not layers:
        raise ValueError(f"this {name} has no self-attention; BlurGuidance ('blur') needs none")
    raise ValueError(
        f"layer {layer!r} is not a self-attention layer of {name}; it must be one of "
        f"{', '.join(layers)}"
    )


def self_attention_layers(denoiser: nn.Module) -> list[str]:
    """Return dotted paths of all self-attention layers of a denoiser, compiled or not."""
    modules = uncompiled(denoiser).named_modules()
    return [name for name, module in modules if _is_self_attention(module)]


def _is_self_attention(module: nn.Module) -> bool:
    return hasattr(module, "set_processor") and not getattr(module, "is_cross_attention", False)
