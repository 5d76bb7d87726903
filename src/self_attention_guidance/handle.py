"""A guided denoiser.

Pipelines, samplers and schedulers never learn that a denoiser is guided: hooks on it read the
attention of its pass, run the second pass and add the guidance term to its own output
(arXiv 2210.00939, Algorithm 1).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .canvas import canvas, picture_tokens
from .capture import AttentionCapture, Scores, received, self_attention, token_grid
from .families import BatchLayout, uncompiled
from .finite import refuse_not_finite
from .held_term import HeldTerm
from .maths import degrade
from .one_thread import OneThread
from .outputs import added, precise, with_first
from .outside_graph import run_uncompiled
from .prediction import prediction_at, step_index
from .refusals import refuse_cache, refuse_compiled_in_place
from .separate_calls import SeparateCalls
from .target import Call, Target

if TYPE_CHECKING:
    from .guidance import _Guidance


# Else two threads could both find a denoiser unguided.
_attaching = threading.Lock()


class GuidanceHandle:
    """A guided denoiser: holds what the last guided step saw, and undoes the guidance.

    Made by the `attach` of `SelfAttentionGuidance` or `BlurGuidance`. Copies of the denoiser
    follow this handle. A denoiser serves one thread at a time, and refuses others.

    Attributes:
        guidance: The settings.
        attached: Whether the denoiser is guided.
        steps: Number of second passes so far: one a guided step that does not hold the term, and
            another one at the first step of a run of two calls a step, unless the pipeline tells
            that the second follows.
        attention: Attention received per position at the last second pass, (images, rows,
            columns) float32, mean 1; `None` before it and for blur guidance, which reads none.
        mask: The positions that were blurred there, (images, rows, columns) bool.
        x0: The clean sample that was predicted there, as the scheduler clips it, before the blur:
            (images, channels, height, width), at least float32. `maths.degrade` with `mask` and
            the guidance's blur gives what the second pass saw, without its noise.
        term: What guidance added at the last guided step to each image's rows of the denoiser's
            output, of their shape, times scale; at least float32. `None` before it.
    """

    def __init__(
        self, guidance: _Guidance, target: Target, is_for_this_thread: bool = False
    ) -> None:
        """Guide `target`; raises ValueError if that is not possible."""
        self.guidance = guidance
        self.attached = True
        self.steps = 0
        self.attention: Tensor | None = None
        self.mask: Tensor | None = None
        self.x0: Tensor | None = None
        self.term: Tensor | None = None
        self._target = target
        self._layer = guidance.attention_layer(target.denoiser)
        self._capture: AttentionCapture | None = None
        self._call: Call | None = None
        self._needs_term = True
        self._held_term = HeldTerm(guidance.every)
        self._term_to_add: Tensor | None = None
        self._calls = SeparateCalls(guidance.branch)
        self._run: Any = None
        self._step = 0
        self._layout: BatchLayout = "single"
        self._in_second_pass = False
        self._is_for_one_call = False
        self._has_begun = False
        self._thread = OneThread(is_for_this_thread)
        if self._layer is not None:
            self_attention(uncompiled(target.denoiser), self._layer)
        with _attaching:
            self._hooks = self._hooked(target.denoiser)

    def _hooked(self, denoiser: nn.Module) -> tuple[RemovableHandle, ...]:
        for module in {denoiser, uncompiled(denoiser)}:
            _refuse_guided(module)
            refuse_compiled_in_place(module)
            refuse_cache(module)
        return (
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """Restore the denoiser, bit for bit; idempotent. What the handle saw stays readable."""
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        self._stop_reading()
        self._calls = SeparateCalls(self.guidance.branch)

    def remove_after_call(self) -> None:
        """Remove the guidance after the next call of the denoiser, also if that fails."""
        self._is_for_one_call = True

    def continue_from(self, earlier: GuidanceHandle) -> None:
        """Hold the term that an earlier handle of the same settings and run holds."""
        self._held_term = earlier._held_term

    def __enter__(self) -> GuidanceHandle:
        """The handle; the denoiser is guided already."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the guidance."""
        self.remove()

    def __deepcopy__(self, memo: object) -> GuidanceHandle:
        """The handle itself: a copied denoiser keeps this handle, its scheduler and pipeline."""
        return self

    @run_uncompiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.attached or (self._in_second_pass and self._thread.is_inside()):
            return
        self._thread.enter()
        if self._is_for_one_call and self._has_begun:  # Ctrl-C ended the one call
            self.remove()
            return
        self._has_begun = True
        self._stop_reading()
        timestep = self._target.scheduler_timestep(args, kwargs)
        self._step = step_index(self._target.scheduler, timestep)
        self._thread.at(self._target.scheduler.timesteps, self._step)
        is_guided = self._is_guided(self._step)
        if not is_guided and self._target.scheduler.timesteps is not self._run:
            return
        # A batch that doesn't fit is refused before the pass is paid.
        call = self._target.call(args, kwargs, self.guidance.branch)
        self._refuse_wrong_layout(call)
        if not is_guided:
            return
        refuse_cache(uncompiled(module))
        self._call = call
        timesteps = self._target.scheduler.timesteps
        passes = 2 if call.layout == "cond_call_first" else 1
        self._term_to_add = self._held_term.at(
            call.sample[call.rows], timesteps, self._step, passes
        )
        if self._term_to_add is not None:
            return
        if call.layout == "cond_call_first":
            is_told = self._target.told_cfg
            scheduler = self._target.scheduler
            self._needs_term = self._calls.begin(scheduler, timestep, call.sample, is_told)
        if self._layer is not None and self._needs_term:
            self._capture = AttentionCapture(self_attention(uncompiled(module), self._layer))
            self._capture.start()

    @run_uncompiled
    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._in_second_pass or not self._thread.is_inside():
            return None
        try:
            return self._output(module, output)
        finally:
            self._thread.leave()
            if self._is_for_one_call:
                self.remove()

    def _output(self, module: nn.Module, output: Any) -> Any:
        """What the denoiser returns instead of `output`; `None` is that."""
        call, needs_term, held = self._call, self._needs_term, self._term_to_add
        scores = self._stop_reading()
        if call is None or output is None:  # the pass failed, and its exception is under way
            return None
        if held is not None:
            self.term = held
            return self._checked(call, output, added(output[0], held))
        if not scores and self._layer is not None and needs_term:
            raise RuntimeError(
                f"no attention was recorded at {self._layer!r}: the layer did not run, or its "
                "processor uses a kernel that can't be read; use diffusers' default processor "
                "there, and if the denoiser was compiled and run before guidance was attached, "
                "call torch.compiler.reset() first"
            )
        term = self._new_term(module, call, output[0], scores) if needs_term else None
        return self._checked(call, output, self._guided(call, output[0], term))

    def _checked(self, call: Call, output: Any, guided: Tensor) -> Any:
        """`output` with `guided` in the place of its first entry."""
        stages = {
            "the denoiser's input": call.sample,
            "the denoiser's prediction": output[0],
            "its prediction in the second pass, of the blurred sample,": guided,
        }
        refuse_not_finite(stages, self._step, call.timestep)
        return with_first(output, guided)

    def _is_guided(self, step: int) -> bool:
        if self.guidance.scale == 0:
            return False
        fraction = step / len(self._target.scheduler.timesteps)
        # A fraction such as 1 - 0.7 is not quite the 0.3 at which the step lies.
        return self.guidance.start - 1e-9 <= fraction < self.guidance.stop - 1e-9

    def _refuse_wrong_layout(self, call: Call) -> None:
        """Notice at the second step of a run that the first one's layout can't have been right."""
        run = self._target.scheduler.timesteps
        is_later, self._run = run is self._run, run
        before, self._layout = self._layout, call.layout
        if is_later:
            self._target.refuse_change(before, call)

    def _stop_reading(self) -> list[Scores]:
        self._call, self._needs_term, self._term_to_add = None, True, None
        capture, self._capture = self._capture, None
        return [] if capture is None else capture.stop()

    def _guided(self, call: Call, whole: Tensor, term: Tensor | None) -> Tensor:
        """The denoiser's output with the guidance term, of the same shape, added."""
        if call.layout == "cond_call_first":
            return self._calls.finish(whole, term)
        return whole if term is None else added(whole, term)

    def _new_term(
        self, module: nn.Module, call: Call, whole: Tensor, scores: list[Scores]
    ) -> Tensor:
        """The guidance term of the guided rows, times scale, by a second pass."""
        place = canvas(self._target.family, call.arguments, whole)
        sample = call.sample[call.rows]
        x_t = precise(place.read(sample))
        u = precise(place.read(whole[call.rows]))
        prediction = prediction_at(self._target.scheduler, call.timestep, x_t.device)
        prediction = prediction.rows(call.rows)
        x0 = prediction.x0(x_t, u)
        self.x0 = prediction.clipped(x0)
        x0_degraded = self._degraded(self.x0, scores, call)
        degraded = place.written(sample, prediction.renoise(x_t, x0, x0_degraded))
        u_degraded = precise(place.read(self._second_pass(module, call, degraded)))
        term = self.guidance.scale * prediction.term(u, u_degraded, x0, x0_degraded)
        nothing = torch.zeros_like(whole[call.rows], dtype=term.dtype)
        self.term = place.written(nothing, term)
        self._held_term.hold(self.term, sample, self._target.scheduler.timesteps, self._step)
        self.steps += 1
        return self.term

    def _degraded(self, x0: Tensor, scores: list[Scores], call: Call) -> Tensor:
        """`x0`, blurred where the guidance wants it."""
        guidance = self.guidance
        if scores:
            self.attention = self._attention(scores, call, *x0.shape[-2:])
        self.mask = guidance.mask(x0[:, 0] if self.attention is None else self.attention)
        return degrade(x0, self.mask, guidance.blur_sigma, guidance.blur_kernel_size)

    def _attention(self, scores: list[Scores], call: Call, height: int, width: int) -> Tensor:
        """Attention received by each of the picture's tokens, (rows, token rows, columns)."""
        config: Any = uncompiled(self._target.denoiser).config
        picture, grid = picture_tokens(
            self._target.family,
            call.arguments,
            scores[0].key.shape[-2],
            config.get("patch_size", 1),
        )
        attention = received(scores, len(call.sample), call.rows, picture if grid else None)
        return attention.unflatten(1, grid or token_grid(attention.shape[1], height, width))

    def _second_pass(self, module: nn.Module, call: Call, degraded: Tensor) -> Tensor:
        args, kwargs = call.with_sample(degraded)
        self._in_second_pass = True
        try:
            return module(*args, **kwargs)[0]
        finally:
            self._in_second_pass = False


def _refuse_guided(module: nn.Module) -> None:
    for hook in module._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, GuidanceHandle) and owner.attached:
            raise ValueError(
                f"{type(module).__name__} is guided already, by {owner.guidance}; remove that "
                "handle first"
            )
