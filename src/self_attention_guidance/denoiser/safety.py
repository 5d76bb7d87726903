"""Checks for denoisers that can't be guided, and what must stay out of a compiled graph."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import GuidanceError
from .families import uncompiled

# Their functions around `forward` cache nothing, and refer to what they are around.
_WRAPPERS = ("torch.", "accelerate.", "diffusers.hooks.")


def run_uncompiled(function: Any) -> Any:
    """Apply `torch.compiler.disable`, with a reason if this version of torch takes one."""
    reason = "it runs around the graph: compile the denoiser itself, before guidance is attached"
    has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    keywords: dict[str, Any] = {"reason": reason} if has_reason else {}
    return torch.compiler.disable(function, **keywords)


def refuse_caches(denoiser: nn.Module) -> None:
    """Refuse a denoiser that reuses results of other steps."""
    network = uncompiled(denoiser)
    name, mixes = type(network).__name__, "which the weakened pass of guidance would mix up"
    if getattr(network, "is_cache_enabled", False):
        raise ValueError(f"{name} keeps a cache over the steps, {mixes}; call its disable_cache()")
    for path, module in network.named_modules():
        where = f"{name}.{path}" if path else name
        hooks: dict[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook_name, hook in hooks.items():
            if getattr(hook, "_is_stateful", False):
                raise ValueError(f"{where} has the hook {hook_name!r}, a cache, {mixes}; remove it")
        replacement = _replaced_by(module)
        if replacement is not None:
            by = getattr(replacement, "__qualname__", type(replacement).__name__)
            # `functools.wraps` copies the other name.
            by = getattr(getattr(replacement, "__code__", None), "co_qualname", by)
            raise ValueError(
                f"the forward of {where} was replaced by {by!r}: caches over the steps (DeepCache, "
                f"TeaCache) do this, {mixes}, and so does code that merges tokens; undo it first"
            )


def recomputes(denoiser: nn.Module) -> bool:
    """Whether `backward` will run blocks of this pass again (gradient checkpointing)."""
    is_on = getattr(uncompiled(denoiser), "is_gradient_checkpointing", False)
    return torch.is_grad_enabled() and is_on


def refuse_recomputing(denoiser: nn.Module) -> None:
    """Refuse layers that are changed during a pass and run again, unchanged, by `backward`."""
    if recomputes(denoiser):
        name = type(uncompiled(denoiser)).__name__
        raise GuidanceError(
            f"{name} computes its layers again for gradients, and would not weaken them then: call "
            "its disable_gradient_checkpointing(), or draw under torch.no_grad()"
        )


def _replaced_by(module: nn.Module) -> Any:
    """Return what replaced the `forward` of a module or of its class; else `None`."""
    bases = [base for base in type(module).__mro__ if "forward" in vars(base)]
    usual = [_innermost(vars(base)["forward"]) for base in bases]
    if "forward" in vars(module):
        own, compiled = _innermost(vars(module)["forward"]), uncompiled(module)
        known = usual if compiled is module else [nn.Module.__call__, compiled]
        is_known = any(own is each for each in known)
        if not is_known and not _source(own).startswith("diffusers.hooks."):
            return own
    package = bases[0].__module__.partition(".")[0]
    if _source(usual[0]).partition(".")[0] == package:
        return None
    # Decorators of other packages are usual, except in these two.
    name = getattr(usual[0], "__module__", None)
    is_decorated = name == bases[0].__module__ and package not in ("diffusers", "torch")
    return None if is_decorated else usual[0]


def _innermost(forward: Any) -> Any:
    """Return the function behind what compiling, offloading and precision wrap around it."""
    while _source(forward).startswith(_WRAPPERS) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return getattr(forward, "__func__", forward)


def _source(function: Any) -> str:
    """Name the module whose code a function runs; `functools.wraps` does not change it."""
    function = function.func if isinstance(function, functools.partial) else function
    names: dict[str, str] = getattr(function, "__globals__", {})
    return names.get("__name__", type(function).__module__)


def not_finite(stages: dict[str, Tensor], step: int, timestep: Any) -> FloatingPointError:
    """Make the error for the first stage with a value that is not finite, else for the last stage.

    The names of the stages must fit "... is not finite".
    """
    found = (name for name, tensor in stages.items() if not tensor.isfinite().all())
    name = next(found, [*stages][-1])
    dtype = stages[name].dtype
    cause = "the weights are damaged, or do not fit the model's config or scheduler"
    if name == "the guided prediction":
        cause = f"the scale of guidance is too large for {str(dtype).removeprefix('torch.')}"
    elif dtype == torch.float16:
        cause = "float16 overflows beyond 65504: use bfloat16 or float32"
    at = float(torch.as_tensor(timestep).flatten()[0])
    return FloatingPointError(f"step {step} (timestep {at:g}): {name} is not finite; {cause}")


def refuse_compiled_in_place(module: nn.Module) -> None:
    """Refuse a denoiser that was compiled together with its hooks: it ignores later hooks."""
    is_compiled = any(each._compiled_call_impl is not None for each in (module, uncompiled(module)))
    if is_compiled and getattr(torch._dynamo.config, "wrap_top_frame", False):
        raise ValueError(
            f"{type(module).__name__} was compiled in place with wrap_top_frame, which ignores "
            "later hooks; attach first, or use torch.compile(denoiser)"
        )
