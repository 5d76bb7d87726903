"""Attach guidances to a denoiser: the part of every method that is the same.

Pipelines, samplers and schedulers never learn that a denoiser is guided: hooks on it read the
attention of its pass, run it again, weakened, and add what guidance makes of the difference to its
own output.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..denoiser.attention import StandIn, received, self_attention, standing_in, why_unseen
from ..denoiser.call import Call, call_of
from ..denoiser.caller import Caller, find_caller, refuse_unknown
from ..denoiser.families import BatchLayout, family_names, family_of, uncompiled
from ..denoiser.layout import Layout, layout_of
from ..denoiser.noise import Prediction, Scheduler, check_scheduler
from ..denoiser.outputs import TwoCalls, added, precise, total, with_first
from ..denoiser.picture import OnCPU, PicturePlace, picture_tokens, place_of
from ..denoiser.run import Run
from ..denoiser.safety import not_finite, refuse_caches, refuse_compiled_in_place, run_uncompiled
from ..denoiser.step import Step
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
    if not guidances or not all(hasattr(each, "weaken") for each in guidances):
        raise ValueError("attach needs a guidance behind its target: SelfAttentionGuidance(0.75)")
    pipeline = None if isinstance(target, nn.Module) else target
    denoiser = _checked_denoiser(target, scheduler, batch_layout)
    handle = GuidanceHandle(guidances, Run(is_for_this_thread), scheduler, batch_layout)
    handle._hook(denoiser, pipeline)
    return handle


def _checked_denoiser(target: Any, scheduler: Any, batch_layout: Any) -> nn.Module:
    """The denoiser of what guidance is attached to, if it can be guided."""
    if batch_layout is not None and batch_layout not in get_args(BatchLayout):
        choices = ", ".join(get_args(BatchLayout))
        raise ValueError(f"batch_layout={batch_layout!r} must be one of {choices}")
    denoiser = _denoiser_of(target)
    if denoiser is None:
        raise ValueError(
            f"target={type(target).__name__} must be a diffusers pipeline with a unet or a "
            f"transformer, or a denoiser; supported denoisers: {', '.join(family_names())}"
        )
    family_of(denoiser)
    if denoiser is target:
        if scheduler is None:
            raise ValueError("scheduler=None must be the scheduler that drives this denoiser")
        check_scheduler(scheduler)
        return denoiser
    refuse_unknown(target)
    if scheduler is not None:
        raise ValueError("scheduler must not be given with a pipeline: its own is used")
    check_scheduler(target.scheduler)
    return denoiser


def _denoiser_of(target: Any) -> nn.Module | None:
    """A denoiser itself, or that of a pipeline."""
    own = getattr(target, "unet", getattr(target, "transformer", None))
    found = target if isinstance(target, nn.Module) else own
    return found if isinstance(found, nn.Module) else None


@dataclass(frozen=True)
class _FirstPass:
    """A call of the denoiser between its two hooks.

    Attributes:
        plan: The guidances that act, by number, each with the noise that it adds again; `None`
            needs a weakened pass.
        has_all_terms: Whether no term is left to a second call of the step.
        read: The layers that are read, by their dotted paths.
    """

    denoiser: nn.Module
    call: Call
    layout: Layout
    plan: dict[int, Tensor | None]
    has_all_terms: bool
    read: dict[str, StandIn]

    def attention(self, layer: str, rows: slice, on_cpu: OnCPU) -> Tensor:
        """What each of the picture's tokens received, (rows, token rows, columns)."""
        noted = self.read[layer].noted
        if not noted:
            reason = why_unseen(self.denoiser, layer)
            raise RuntimeError(f"no attention was recorded at {layer!r}: {reason}")
        positions = noted[0].key.shape[-2]
        picture, grid = picture_tokens(self.denoiser, layer, self.call, positions, on_cpu)
        return received(noted, len(self.call.sample), rows, picture).unflatten(1, grid)


@dataclass(frozen=True)
class _Branch:
    """The rows of a call that a guidance compares with those of a weakened pass."""

    rows: slice
    sample: Tensor
    output: Tensor
    place: PicturePlace
    levels: Prediction


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

    def __init__(
        self,
        guidances: tuple[Guidance, ...],
        run: Run,
        scheduler: Scheduler | None,
        batch_layout: BatchLayout | None,
    ) -> None:
        """Use `attach`."""
        self.guidances = guidances
        self.attached = True
        self.steps = 0
        self.x0: Tensor | None = None
        self.term: Tensor | None = None
        self.noted: dict[str, Tensor] = {}
        self._run, self._two_calls = run, TwoCalls()
        self._scheduler: Scheduler | None = scheduler
        self._layout: BatchLayout | None = batch_layout
        # A pipeline keeps its handle, and a denoiser its hooks: neither may be kept by them.
        self._denoiser: Any = _nothing
        self._pipeline: Any = _nothing
        self._hooks: tuple[RemovableHandle, ...] = ()
        self._reading = ExitStack()
        self._first: _FirstPass | None = None
        self._is_weak = self._is_for_one_call = self._has_begun = False

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
        """Remove the guidance; refuse a pipeline that got another denoiser, not guided."""
        self.remove()
        present = _denoiser_of(self._pipeline())
        if error is None and present is not None and not self._was_on(present):
            raise RuntimeError(
                f"{type(self._pipeline()).__name__} got another denoiser after guidance was "
                "attached; what it drew with that one is not guided: attach again after the change"
            )

    def __deepcopy__(self, memo: object) -> GuidanceHandle:
        """The handle itself: a copied denoiser keeps this handle."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process; a guided denoiser can be pickled."""
        transient = {"_denoiser": _nothing, "_pipeline": _nothing, "_reading": ExitStack()}
        of_calls = {"_first": None, "_is_weak": False, "_two_calls": TwoCalls()}
        return {**self.__dict__, **transient, **of_calls}

    # The hooks

    def _hook(self, denoiser: nn.Module, pipeline: Any) -> None:
        for guidance in self.guidances:
            for layer in guidance.reads(denoiser):
                self_attention(denoiser, layer)
        with _attaching:
            for module in {denoiser, uncompiled(denoiser)}:
                _refuse_guided(module)
                refuse_compiled_in_place(module)
            refuse_caches(denoiser)
            self._hooks = (
                denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
                denoiser.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            )
        self._denoiser = weakref.ref(denoiser)
        self._pipeline = _nothing if pipeline is None else weakref.ref(pipeline)

    @run_uncompiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._run
        if not self.attached or (self._is_weak and run.is_inside()):
            return
        run.enter(module)
        if self._is_for_one_call and self._has_begun:  # Ctrl-C ended the one call
            self.remove()
            return
        self._has_begun, self._is_weak = True, False
        self._stop_reading()
        call = call_of(module, args, kwargs)
        caller = find_caller(self._pipeline())
        run.at(call, caller, self._scheduler)
        if run.is_new:
            refuse_caches(module)
        steps = len(run.tables)
        acting = [n for n, each in enumerate(self.guidances) if each.acts_at(run.step, steps)]
        if acting:
            self._first = self._begin(module, call, caller, acting)
        else:
            run.read_checks()

    @run_uncompiled
    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._is_weak or not self._run.is_inside():
            return None
        try:
            first = self._stop_reading()
            if first is None or output is None:  # the pass failed, its exception is under way
                return None
            return with_first(output, self._guided(first, output[0]))
        finally:
            self._run.leave()
            if self._is_for_one_call:
                self.remove()

    def _stop_reading(self) -> _FirstPass | None:
        first, self._first = self._first, None
        self._reading.close()
        return first

    def _begin(
        self, denoiser: nn.Module, call: Call, caller: Caller | None, acting: list[int]
    ) -> _FirstPass:
        """What the call holds, and what each acting guidance needs of it."""
        run, two_calls = self._run, self._two_calls
        layout = layout_of(call, caller, self._layout) or run.layout(denoiser, call, caller)
        if layout.has_two_calls:
            cfg = None if caller is None else caller.cfg
            two_calls.begin(run.is_new, run.is_same_sample(call), cfg)
        run.compare(call, layout)
        plan: dict[int, Tensor | None] = {}
        layers: set[str] = set()
        for number in acting:
            guidance = self.guidances[number]
            shape = call.sample[layout.rows(len(call.sample), guidance.branch)].shape
            held = run.held(number, guidance.every, shape, 2 if layout.has_two_calls else 1)
            if held is not None:
                plan[number] = held
            elif two_calls.needs_term(layout, guidance.branch):
                plan[number] = None
                layers.update(guidance.reads(denoiser))
        read = {n: self._reading.enter_context(standing_in(denoiser, n)) for n in layers}
        return _FirstPass(denoiser, call, layout, plan, len(plan) == len(acting), read)

    # Algorithm 1

    def _guided(self, first: _FirstPass, whole: Tensor) -> Tensor:
        """The denoiser's output with what all guidances add to it."""
        call, run = first.call, self._run
        place = place_of(call, whole, run.on_cpu)
        prediction = run.prediction(call, precise(call.sample))
        terms: dict[int, Tensor] = {}
        for number, held in first.plan.items():
            rows = first.layout.rows(len(call.sample), self.guidances[number].branch)
            levels = prediction.rows(rows)
            branch = _Branch(rows, call.sample[rows], whole[rows], place, levels)
            term = self._term(number, first, branch) if held is None else levels.held(held)
            terms[number] = place.written(torch.zeros_like(whole[rows], dtype=term.dtype), term)
        if first.layout.has_two_calls:
            guided, terms = self._two_calls.finish(whole, terms, first.has_all_terms)
        else:
            guided = added(whole, terms)
        self.term = total(terms).detach() if terms else self.term
        stages = {
            "the denoiser's input": call.sample,
            "the denoiser's prediction": whole,
            "its prediction in the weakened pass": guided,
        }
        for name, tensor in stages.items():
            is_bad = ~tensor.isfinite().all()
            run.refuse(is_bad, not_finite, name, tensor.dtype, run.step, call.timestep)
        run.read_checks()
        return guided

    def _term(self, number: int, first: _FirstPass, branch: _Branch) -> Tensor:
        """scale * (eps - eps'), in units of the output, by a weakened pass."""
        guidance, run = self.guidances[number], self._run
        sample, place, levels = branch.sample, branch.place, branch.levels
        x_t, u = precise(place.read(sample)), precise(place.read(branch.output))
        x0 = levels.x0(x_t, u)
        layers = guidance.reads(first.denoiser)
        attention = {n: first.attention(n, branch.rows, run.on_cpu) for n in layers}
        step = Step(first.denoiser, levels.limited(x0), attention)
        with guidance.weaken(step) as x0_weak:
            sample_weak = sample
            if x0_weak is not None:
                sample_weak = place.written(sample, levels.renoise(x_t, x0, x0_weak))
            u_weak = precise(place.read(self._weak_output(first, branch.rows, sample_weak)))
        change = None if x0_weak is None else x0_weak - x0
        term = guidance.scale * levels.term(u, u_weak, change)
        is_nothing = (term == 0).all()
        if change is not None:  # where there was nothing to blur, there is nothing to add
            is_nothing = is_nothing & (sample_weak != sample).any()
        run.refuse(is_nothing, RuntimeError, _NO_EFFECT.format(run.step, guidance))
        run.hold(number, levels.noise(term.detach()), sample.shape)
        self.x0, self.noted = step.x0.detach(), step.noted
        self.steps += 1
        return term

    def _weak_output(self, first: _FirstPass, rows: slice, sample: Tensor) -> Tensor:
        args, kwargs = first.call.rows(rows, sample)
        self._is_weak = True
        try:
            output: Tensor = first.denoiser(*args, **kwargs)[0]
        finally:
            self._is_weak = False
        if len(output) != len(sample):
            raise RuntimeError(
                f"the weakened pass of {len(sample)} pictures returned {len(output)}: an argument "
                "holds a row for each picture, which guidance does not know of; see "
                "register_batch_arguments"
            )
        return output

    def _was_on(self, denoiser: nn.Module) -> bool:
        """Whether a denoiser is the guided one, or a copy of it."""
        own = self._denoiser()
        modules = {denoiser, uncompiled(denoiser)}
        is_own = own is not None and not modules.isdisjoint({own, uncompiled(own)})
        return is_own or any(self in _handles_on(module) for module in modules)


_NO_EFFECT = (
    "step {}: {} had no effect: the weakened network predicted exactly what the network itself did"
)


def _handles_on(module: nn.Module) -> list[GuidanceHandle]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_hooks.values()]
    return [owner for owner in owners if isinstance(owner, GuidanceHandle)]


def _refuse_guided(module: nn.Module) -> None:
    for handle in _handles_on(module):
        if handle.attached:
            by = " and ".join(str(guidance) for guidance in handle.guidances)
            raise ValueError(
                f"{type(module).__name__} is guided already, by {by}; remove that handle first"
            )


def _nothing() -> None:
    """In place of a weak reference to what is not there."""
