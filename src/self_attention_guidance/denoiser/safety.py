"""Checks for denoisers that can't be guided, and what must stay out of a compiled graph."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .families import uncompiled


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
        own = vars(module).get("forward", _replaced_by(type(module)))
        if own is None or hooks or getattr(own, "__func__", None) is type(module).forward:
            continue
        # Compiling and offloading also replace `forward`, but cache nothing.
        if not hasattr(own, "_torchdynamo_orig_callable") and not hasattr(module, "_hf_hook"):
            by = getattr(own, "__qualname__", type(own).__name__)
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
        raise RuntimeError(
            f"{name} computes its layers again for gradients, and would not weaken them then: call "
            "its disable_gradient_checkpointing(), or draw under torch.no_grad()"
        )


@functools.cache
def _replaced_by(cls: type[nn.Module]) -> Any:
    """Return the function that replaced a class's `forward`, as TeaCache does; else `None`."""
    base = next(base for base in cls.__mro__ if "forward" in vars(base))
    forward = vars(base)["forward"]
    is_of_its_module = getattr(forward, "__module__", None) == base.__module__
    is_of_its_name = getattr(forward, "__qualname__", None) == f"{base.__qualname__}.forward"
    return None if is_of_its_module or is_of_its_name else forward


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
