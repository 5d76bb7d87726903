"""Attach guidances to a denoiser: the part of every method that is the same.

Pipelines, samplers and schedulers never learn that a denoiser is guided: hooks on it read the
attention of its pass, run it again, weakened, and add what guidance makes of the difference to its
own output.
"""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..denoiser.attention import AttentionCapture, Scores, received, self_attention, why_unseen
from ..denoiser.call import Call, call_of
from ..denoiser.caller import Caller, find_caller, refuse_unknown
from ..denoiser.families import BatchLayout, Family, family_names, family_of
from ..denoiser.finite import not_finite
from ..denoiser.layout import Layout, layout_of
from ..denoiser.noise import Prediction, check_scheduler
from ..denoiser.outputs import added, precise, with_first
from ..denoiser.picture import PicturePlace, picture_tokens, place_of
from ..denoiser.protocols import Scheduler, uncompiled
from ..denoiser.run import Run
from ..denoiser.safety import refuse_caches, refuse_compiled_in_place, run_uncompiled
from ..denoiser.step import Step
from ..denoiser.two_calls import TwoCalls, total
from .base import Guidance

# Else two threads could both find a denoiser unguided.
_attaching = threading.Lock()


def attach(
    target: Any,
    *guidances: Guidance,
    scheduler: Scheduler | None = None,
    batch_layout: BatchLayout | None = None,
    is_for_this_thread: bool = False,
) -> GuidanceHandle:
    """Guide every call of a denoiser until the handle is removed.

    Several guidances share the first pass. Each has a weakened pass, and a window of steps, of its
    own; what they add is summed, in any order.

    Args:
        target: A diffusers pipeline, or a denoiser for a loop of your own.
        *guidances: At least one.
        scheduler: The scheduler that drives a bare denoiser. For a pipeline, that of the pipeline
            that runs is used.
        batch_layout: See `Guidance.attach`.
        is_for_this_thread: Refuse calls of other threads, for a pipeline's own call.

    Returns:
        The handle; use it in a `with` statement, or call its `remove`.

    Raises:
        ValueError: The denoiser, its layers or the scheduler are not supported, or the denoiser is
            guided already.
    """
    if not guidances or not all(isinstance(each, Guidance) for each in guidances):
        raise ValueError("attach needs guidances behind its target, SelfAttentionGuidance() say")
    if batch_layout is not None and batch_layout not in get_args(BatchLayout):
        choices = ", ".join(get_args(BatchLayout))
        raise ValueError(f"batch_layout={batch_layout!r} must be one of {choices}")
    pipeline = None if isinstance(target, nn.Module) else target
    denoiser = target if isinstance(target, nn.Module) else _denoiser_of(target)
    if denoiser is None:
        raise ValueError(
            f"target={type(target).__name__} must be a diffusers pipeline with a unet or a "
            f"transformer, or a denoiser; supported denoisers: {', '.join(family_names())}"
        )
    family = family_of(denoiser)
    if pipeline is None:
        if scheduler is None:
            raise ValueError("scheduler=None must be the scheduler that drives this denoiser")
        check_scheduler(scheduler)
    else:
        if scheduler is not None:
            raise ValueError("scheduler must not be given with a pipeline: its own is used")
        refuse_unknown(pipeline)
        check_scheduler(pipeline.scheduler)
    target = _Target(denoiser, family, scheduler, pipeline, batch_layout)
    return GuidanceHandle(guidances, target, Run(is_for_this_thread))


@dataclass(frozen=True)
class _Target:
    """What `attach` was given."""

    denoiser: nn.Module
    family: Family
    scheduler: Scheduler | None
    pipeline: Any
    layout: BatchLayout | None


@dataclass(frozen=True)
class _FirstPass:
    """A call of the denoiser between its two hooks.

    Attributes:
        call: The call.
        layout: What it holds.
        plan: The guidances that act, by number, each with the noise that it adds again; `None`
            needs a weakened pass.
        has_all_terms: Whether no term is left to a second call of the step.
        captures: What reads attention layers, by their dotted paths.
    """

    call: Call
    layout: Layout
    plan: dict[int, Tensor | None]
    has_all_terms: bool
    captures: dict[str, AttentionCapture]


class GuidanceHandle:
    """A guided denoiser: holds what the last guided step saw, and undoes the guidance.

    Made by `attach`. Copies of the denoiser follow this handle. A denoiser serves one thread at a
    time, and refuses others.

    Attributes:
        guidances: The settings.
        attached: Whether the denoiser is guided.
        steps: Number of weakened passes so far: one for each guidance and guided step that does
            not hold its term, and another one at the first step of a run of two calls a step,
            unless the pipeline tells that the second follows.
        x0: The clean sample that was predicted at the last weakened pass, as the scheduler clips
            or thresholds it: (pictures, channels, height, width), at least float32.
        term: What guidance added at the last guided step to each picture's rows of the denoiser's
            output, of their shape, times scale; at least float32. `None` before it.
        noted: What the last weakened pass noted, by name: "attention" and "mask" of
            `SelfAttentionGuidance`.
    """

    def __init__(self, guidances: tuple[Guidance, ...], target: _Target, run: Run) -> None:
        """Guide `target`; raises ValueError if that is not possible."""
        self.guidances = guidances
        self.attached = True
        self.steps = 0
        self.x0: Tensor | None = None
        self.term: Tensor | None = None
        self.noted: dict[str, Tensor] = {}
        # A pipeline keeps its handle, and a denoiser its hooks: neither may be kept by them.
        self._denoiser = weakref.ref(target.denoiser)
        self._pipeline = None if target.pipeline is None else weakref.ref(target.pipeline)
        self._family = target.family
        self._scheduler = target.scheduler
        self._own_layout = target.layout
        self._run = run
        self._two_calls = TwoCalls()
        self._first: _FirstPass | None = None
        self._is_weak = False
        self._is_for_one_call = self._has_begun = False
        for layer in self._layers(target.denoiser):
            self_attention(target.denoiser, layer)
        with _attaching:
            self._hooks = self._hooked(target.denoiser)

    @property
    def guidance(self) -> Any:
        """The settings of the first guidance."""
        return self.guidances[0]

    @property
    def attention(self) -> Tensor | None:
        """Attention received per position at the last weakened pass of self-attention guidance.

        Shape (pictures, rows, columns), float32, mean 1; `None` if none was read.
        """
        return self.noted.get("attention")

    @property
    def mask(self) -> Tensor | None:
        """The positions that were blurred there, (pictures, rows, columns) bool; or `None`."""
        return self.noted.get("mask")

    def remove(self) -> None:
        """Restore the denoiser, bit for bit; idempotent. What the handle saw stays readable."""
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        self._stop_reading()
        self._two_calls = TwoCalls()

    def remove_after_call(self) -> None:
        """Remove the guidance after the next call of the denoiser, also if that fails."""
        self._is_for_one_call = True

    def continue_from(self, earlier: GuidanceHandle) -> None:
        """Go on with the run of an earlier handle of the same guidances, and what it holds."""
        self._run = earlier._run

    def __enter__(self) -> GuidanceHandle:
        """The handle; the denoiser is guided already."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Remove the guidance.

        Raises:
            RuntimeError: The pipeline got another denoiser, which was not guided.
        """
        self.remove()
        pipeline = self._pipeline and self._pipeline()
        present = None if pipeline is None else _denoiser_of(pipeline)
        if error is None and present is not None and not self._was_on(present):
            raise RuntimeError(
                f"{type(pipeline).__name__} got another denoiser after guidance was attached; "
                "what it drew with that one is not guided: attach again after the change"
            )

    def __deepcopy__(self, memo: object) -> GuidanceHandle:
        """The handle itself: a copied denoiser keeps this handle."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process; a guided denoiser can be pickled."""
        transient = {"_denoiser": _nothing, "_pipeline": None, "_first": None}
        return {**self.__dict__, **transient, "_two_calls": TwoCalls(), "_is_weak": False}

    # The hooks

    def _hooked(self, denoiser: nn.Module) -> tuple[RemovableHandle, ...]:
        for module in {denoiser, uncompiled(denoiser)}:
            _refuse_guided(module)
            refuse_compiled_in_place(module)
        refuse_caches(denoiser)
        return (
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    @run_uncompiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.attached or (self._is_weak and self._run.is_inside()):
            return
        self._run.enter(module)
        if self._is_for_one_call and self._has_begun:  # Ctrl-C ended the one call
            self.remove()
            return
        self._has_begun, self._is_weak = True, False
        self._stop_reading()
        call = call_of(module, self._family, args, kwargs)
        caller = find_caller(self._pipeline and self._pipeline())
        self._run.at(call, caller, self._scheduler)
        if self._run.is_new:
            refuse_caches(module)
        step, steps = self._run.step, len(self._run.tables)
        acting = [n for n, each in enumerate(self.guidances) if each.acts_at(step, steps)]
        if not acting:
            self._run.checks.read()
            return
        self._first = self._planned(module, call, caller, acting)
        for capture in self._first.captures.values():
            capture.start()

    @run_uncompiled
    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._is_weak or not self._run.is_inside():
            return None
        try:
            first, scores = self._stop_reading()
            if first is None or output is None:  # the pass failed, its exception is under way
                return None
            return with_first(output, self._guided(module, first, scores, output[0]))
        finally:
            self._run.leave()
            if self._is_for_one_call:
                self.remove()

    def _stop_reading(self) -> tuple[_FirstPass | None, dict[str, list[Scores]]]:
        first, self._first = self._first, None
        captures = {} if first is None else first.captures
        return first, {layer: capture.stop() for layer, capture in captures.items()}

    # What a call is for

    def _planned(
        self, module: nn.Module, call: Call, caller: Caller | None, acting: list[int]
    ) -> _FirstPass:
        run, two_calls = self._run, self._two_calls
        layout = layout_of(call, caller, self._own_layout)
        if layout is None:
            layout = run.layout(module, call, caller)
        if layout.has_two_calls:
            cfg = None if caller is None else caller.cfg
            two_calls.begin(run.is_new, run.is_same_sample(call), cfg)
        run.notice(call, layout)
        plan: dict[int, Tensor | None] = {}
        for number in acting:
            guidance = self.guidances[number]
            shape = call.sample[layout.rows(len(call.sample), guidance.branch)].shape
            held = run.held_noise(number, guidance.every, shape, 2 if layout.has_two_calls else 1)
            if held is not None or not layout.has_two_calls:
                plan[number] = held
            elif two_calls.needs_term(layout, guidance.branch):
                plan[number] = None
        fresh = [self.guidances[number] for number, held in plan.items() if held is None]
        layers = {layer for guidance in fresh for layer in guidance.reads(module)}
        captures = {layer: AttentionCapture(self_attention(module, layer)) for layer in layers}
        return _FirstPass(call, layout, plan, len(plan) == len(acting), captures)

    # Algorithm 1

    def _guided(
        self, module: nn.Module, first: _FirstPass, scores: dict[str, list[Scores]], whole: Tensor
    ) -> Tensor:
        """The denoiser's output with what all guidances add to it."""
        call, run = first.call, self._run
        for layer, noted in scores.items():
            if not noted:
                processor: Any = getattr(self_attention(module, layer), "processor", None)
                raise RuntimeError(
                    f"no attention was recorded at {layer!r}: {why_unseen(processor)}"
                )
        place = place_of(call, whole, run.on_cpu)
        prediction = run.prediction(call, precise(call.sample))
        terms: dict[int, Tensor] = {}
        for number, held in first.plan.items():
            rows = first.layout.rows(len(call.sample), self.guidances[number].branch)
            levels = prediction.rows(rows)
            if held is None:
                work = _Work(module, call, rows, place, levels, scores, whole)
                term = self._term(number, work)
            else:
                term = levels.held(held)
            nothing = torch.zeros_like(whole[rows], dtype=term.dtype)
            terms[number] = place.written(nothing, term)
        if first.layout.has_two_calls:
            guided = self._two_calls.finish(whole, terms, first.has_all_terms)
            terms = {**self._two_calls.first_terms, **terms}
        else:
            guided = added(whole, total(terms))
        self.term = total(terms).detach() if terms else self.term
        self._check_finite(call, whole, guided)
        run.read_checks()
        return guided

    def _term(self, number: int, work: _Work) -> Tensor:
        """scale * (eps - eps'), in units of the output, by a weakened pass."""
        guidance, run, levels = self.guidances[number], self._run, work.levels
        sample = work.call.sample[work.rows]
        x_t, u = precise(work.place.read(sample)), precise(work.place.read(work.whole[work.rows]))
        x0 = levels.x0(x_t, u)
        step = Step(work.module, levels.limited(x0), work.attention(guidance, run.on_cpu))
        with guidance.weaken(step) as x0_degraded:
            change = None if x0_degraded is None else x0_degraded - x0
            degraded = sample
            if x0_degraded is not None:
                x_degraded = levels.renoise(x_t, x0, x0_degraded)
                degraded = work.place.written(sample, x_degraded)
            u_weak = precise(work.place.read(self._weak_pass(work, degraded)))
        term = guidance.scale * levels.term(u, u_weak, change)
        has_changed = torch.tensor(True) if change is None else (degraded != sample).any()
        run.checks.refuse(
            has_changed.to(term.device) & (term == 0).all(),
            functools.partial(_no_effect, guidance, run.step),
        )
        noise = levels.noise(term.detach())
        run.hold(number, noise, sample.shape)
        self.x0, self.noted = step.x0.detach(), step.noted
        self.steps += 1
        return term

    def _weak_pass(self, work: _Work, sample: Tensor) -> Tensor:
        args, kwargs = work.call.rows(work.rows, sample)
        self._is_weak = True
        try:
            output: Tensor = work.module(*args, **kwargs)[0]
        finally:
            self._is_weak = False
        if len(output) != len(sample):
            raise RuntimeError(
                f"the weakened pass of {len(sample)} pictures returned {len(output)}: an argument "
                "holds a row for each picture, which guidance does not know of; see "
                "register_batch_arguments"
            )
        return output

    def _check_finite(self, call: Call, whole: Tensor, guided: Tensor) -> None:
        stages = {
            "the denoiser's input": call.sample,
            "the denoiser's prediction": whole,
            "its prediction in the second pass, of the blurred sample,": guided,
        }
        for name, tensor in stages.items():
            error = functools.partial(not_finite, name, tensor.dtype, self._run.step, call.timestep)
            self._run.checks.refuse(~tensor.isfinite().all(), error)

    def _layers(self, denoiser: nn.Module) -> list[str]:
        return [layer for guidance in self.guidances for layer in guidance.reads(denoiser)]

    def _was_on(self, denoiser: nn.Module) -> bool:
        """Whether a denoiser is the guided one, or a copy of it."""
        own = self._denoiser()
        modules = (denoiser, uncompiled(denoiser))
        if own is not None and any(module in (own, uncompiled(own)) for module in modules):
            return True
        hooks = [hook for module in modules for hook in module._forward_hooks.values()]
        return any(getattr(hook, "__self__", None) is self for hook in hooks)


@dataclass(frozen=True)
class _Work:
    """What a weakened pass starts from: the first pass and its output."""

    module: nn.Module
    call: Call
    rows: slice
    place: PicturePlace
    levels: Prediction
    scores: dict[str, list[Scores]]
    whole: Tensor

    def attention(self, guidance: Guidance, on_cpu: Any) -> dict[str, Tensor]:
        """What each of the picture's tokens received in the layers that a guidance reads."""
        found: dict[str, Tensor] = {}
        for layer in guidance.reads(self.module):
            scores = self.scores[layer]
            positions = scores[0].key.shape[-2]
            picture, grid = picture_tokens(self.module, layer, self.call, positions, on_cpu)
            inside = picture if self.call.family.joint else None
            values = received(scores, len(self.call.sample), self.rows, inside)
            found[layer] = values.unflatten(1, grid)
        return found


def _denoiser_of(pipeline: Any) -> nn.Module | None:
    found = getattr(pipeline, "unet", getattr(pipeline, "transformer", None))
    return found if isinstance(found, nn.Module) else None


def _nothing() -> None:
    """In place of a weak reference, which can't be pickled."""


def _no_effect(guidance: Guidance, step: int) -> RuntimeError:
    return RuntimeError(
        f"step {step}: {guidance} had no effect: the weakened network predicted exactly what the "
        "network itself did"
    )


def _refuse_guided(module: nn.Module) -> None:
    for hook in module._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, GuidanceHandle) and owner.attached:
            by = " and ".join(str(guidance) for guidance in owner.guidances)
            raise ValueError(
                f"{type(module).__name__} is guided already, by {by}; remove that handle first"
            )
