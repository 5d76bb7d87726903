"""Denoisers that can't be guided as they are, and what must stay out of their graph."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from .families import uncompiled


def run_uncompiled(function: Any) -> Any:
    """`torch.compiler.disable`, with a reason if torch can give one."""
    reason = (
        "guidance runs around the denoiser, not in its graph; with fullgraph=True, compile the "
        "denoiser itself, before guidance is attached, and not what calls it"
    )
    has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    keywords: dict[str, Any] = {"reason": reason} if has_reason else {}
    return torch.compiler.disable(function, **keywords)


def refuse_caches(denoiser: nn.Module) -> None:
    """Refuse a denoiser that reuses what it computed at other steps.

    The weakened pass would overwrite what the first pass keeps, or read it.
    """
    network = uncompiled(denoiser)
    name = type(network).__name__
    mixes = "which the weakened pass of guidance would mix up"
    if getattr(network, "is_cache_enabled", False):
        raise ValueError(
            f"{name} reuses what it computed at other steps (enable_cache), {mixes}; call its "
            "disable_cache() first"
        )
    for path, module in network.named_modules():
        where = f"{name}.{path}" if path else name
        hooks: dict[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook_name, hook in hooks.items():
            if getattr(hook, "_is_stateful", False):
                raise ValueError(
                    f"{where} has the hook {hook_name!r}, which keeps what it computed at other "
                    f"steps, {mixes}; remove it first"
                )
        own = vars(module).get("forward", _replaced_by(type(module)))
        if own is not None and not hooks and not _is_harmless(module, own):
            raise ValueError(
                f"the forward of {where} was replaced by "
                f"{getattr(own, '__qualname__', type(own).__name__)!r}: caches over the steps "
                f"(DeepCache, TeaCache) do this, {mixes}, and so does what merges tokens; undo it "
                "first"
            )


@functools.cache
def _replaced_by(cls: type[nn.Module]) -> Any:
    """What took the place of a class's `forward`, as TeaCache does it; `None` if it is its own."""
    base = next(base for base in cls.__mro__ if "forward" in vars(base))
    forward = vars(base)["forward"]
    is_of_its_module = getattr(forward, "__module__", None) == base.__module__
    is_of_its_name = getattr(forward, "__qualname__", None) == f"{base.__qualname__}.forward"
    return None if is_of_its_module or is_of_its_name else forward


def not_finite(name: str, dtype: torch.dtype, step: int, timestep: Any) -> FloatingPointError:
    """The error that says where values, of a name that fits "... is not finite", are no numbers."""
    cause = "the weights are damaged, or do not fit the model's config or scheduler"
    if dtype == torch.float16:
        cause = "float16 overflows beyond 65504: use bfloat16 or float32"
    at = float(torch.as_tensor(timestep).flatten()[0])
    return FloatingPointError(f"step {step} (timestep {at:g}): {name} is not finite; {cause}")


def refuse_compiled_in_place(module: nn.Module) -> None:
    """Refuse a denoiser whose later hooks would be ignored.

    torch compiles hooks together with the module if told to, and does not look for later ones.
    Otherwise they run around what is compiled.
    """
    is_compiled = any(each._compiled_call_impl is not None for each in (module, uncompiled(module)))
    if is_compiled and getattr(torch._dynamo.config, "wrap_top_frame", False):
        raise ValueError(
            f"{type(module).__name__} was compiled in place with torch._dynamo.config."
            "wrap_top_frame, where hooks that are added later are ignored; attach first, or use "
            "torch.compile(denoiser) instead of denoiser.compile()"
        )


def _is_harmless(module: nn.Module, forward: Any) -> bool:
    """Whether a module's own `forward` is known to keep nothing: offloaded, compiled, its own."""
    is_compiled = hasattr(forward, "_torchdynamo_orig_callable")
    is_its_own = getattr(forward, "__func__", None) is type(module).forward
    return is_compiled or is_its_own or hasattr(module, "_hf_hook")
