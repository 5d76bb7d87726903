"""Attach guidances to the denoiser of a pipeline, or of a loop of one's own.

Hooks on the denoiser read the attention of its pass, run a weakened pass, and add the guidance term
to its output. Pipelines, samplers and schedulers do not notice.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn

from ..checks import GuidanceError
from ..denoiser.attention import self_attention, standing_in
from ..denoiser.call import Call, call_of, layout_of
from ..denoiser.caller import Caller, find_caller, refuse_unknown
from ..denoiser.families import FAMILIES, BatchLayout, denoiser_of, family_of, uncompiled
from ..denoiser.joint import JointPass
from ..denoiser.noise import Scheduler, check_scheduler
from ..denoiser.outputs import added, stacked, total, with_first
from ..denoiser.run import Run
from ..denoiser.safety import refuse_caches, refuse_compiled_in_place, run_uncompiled
from .base import Guidance
from .guided_call import GuidedCall
from .window import acts, check_window

if TYPE_CHECKING:
    from .several import GuidanceSum

# Without a lock, two threads could both find a denoiser without guidance.
_attaching = threading.Lock()

# Hooks on a compiled network can't be found from the network behind it.
_behind_compiled: weakref.WeakKeyDictionary[nn.Module, GuidanceHandle] = weakref.WeakKeyDictionary()


def attach(
    target: Any,
    *guidances: Guidance | GuidanceSum,
    scheduler: Scheduler | None = None,
    batch_layout: BatchLayout | None = None,
    is_for_this_thread: bool = False,
) -> GuidanceHandle:
    """Guide every call of a denoiser until the handle is removed.

    Several guidances share the first pass. Each has its own weakened pass and its own window of
    steps. Their terms are added; the order does not matter.

    Args:
        target: A diffusers pipeline, or a denoiser for a loop of your own.
        *guidances: At least one; a sum, `a + b`, is all of its parts.
        scheduler: See `Guidance.attach`.
        batch_layout: See `Guidance.attach`.
        is_for_this_thread: Whether to refuse calls of other threads. Pipelines that attach guidance
            in their own call set it.

    Raises:
        ValueError: The denoiser, its layers or the scheduler are not supported; the denoiser is
            already guided; or guidances use `rescale` or `norm_limit` and differ in one of them or
            in `branch`.
    """
    found = (each.parts if hasattr(type(each), "parts") else (each,) for each in guidances)
    parts: tuple[Any, ...] = tuple(part for several in found for part in several)
    if not parts or not all(isinstance(part, Guidance) for part in parts):
        wrong = next((part for part in parts if not isinstance(part, Guidance)), None)
        raise ValueError(
            f"guidances={wrong!r:.80} must be guidances, one after the other:"
            " attach(pipe, SelfAttentionGuidance(0.75))"
        )
    _refuse_mixed_limits(parts)
    denoiser = _denoiser_of(target)
    family_of(denoiser)
    layouts = get_args(BatchLayout)
    if batch_layout not in (None, *layouts):
        raise ValueError(f"batch_layout={batch_layout!r} must be one of {', '.join(layouts)}")
    pipeline, run = None if denoiser is target else target, Run(is_for_this_thread)
    check_scheduler(_scheduler_of(pipeline, scheduler))
    return GuidanceHandle(denoiser, pipeline, parts, run, scheduler, batch_layout)


def detach(target: Any) -> None:
    """Remove the guidance from a denoiser, as `GuidanceHandle.remove` does; idempotent.

    It serves where the handle was not kept, as in a notebook.

    Args:
        target: A diffusers pipeline, or a denoiser.

    Raises:
        ValueError: It has no denoiser.
    """
    for handle in _handles_on(_denoiser_of(target)):
        handle.remove()


def _denoiser_of(target: Any) -> nn.Module:
    denoiser = denoiser_of(target)
    if denoiser is None:
        raise ValueError(
            f"target={type(target).__name__} must be a diffusers pipeline with a unet or a "
            f"transformer, or a denoiser; supported denoisers: {', '.join(FAMILIES)}"
        )
    return denoiser


def _scheduler_of(pipeline: Any, given: Scheduler | None) -> Scheduler:
    if pipeline is None:
        if given is None:
            raise ValueError("scheduler=None must be the scheduler that drives this denoiser")
        return given
    refuse_unknown(pipeline)
    if given is not None:
        raise ValueError("scheduler must not be given with a pipeline: its own is used")
    return pipeline.scheduler


class _OneDenoiser:
    """The run of a denoiser, and what guidance reads in its present call."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reading = ExitStack()
        self.guided_call: GuidedCall | None = None
        self.joint: JointPass | None = None

    def stop_reading(self) -> GuidedCall | None:
        guided_call, self.guided_call = self.guided_call, None
        self.reading.close()
        if self.joint is not None:
            self.joint.end_if_over()
        return guided_call


class _EachDenoiser(weakref.WeakKeyDictionary[nn.Module, _OneDenoiser]):
    """The guided denoiser and its copies: each has its own run, so each may have its own thread."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without any run: another process has its own threads and runs."""
        return _EachDenoiser, ()

    def of(self, denoiser: nn.Module) -> _OneDenoiser:
        return self.get(denoiser) or self.setdefault(denoiser, _OneDenoiser(Run()))


class GuidanceHandle:
    """The guidance on a denoiser: keeps values of the last guided step, and removes the guidance.

    `attach` makes it. Copies of the denoiser use the same handle, but each has a run of its own.
    Each serves one thread at a time, and refuses others.

    Attributes:
        guidances: The settings.
        attached: Whether the denoiser is guided.
        steps: Number of weakened predictions so far: one for each guidance and guided step, except
            where a held term is added again. With two calls for each step, a run has one more at
            its first step and at its last, unless its pipeline says whether classifier-free
            guidance is on.
        x0: The clean sample predicted at the last weakened pass, clipped or thresholded as the
            scheduler does: (pictures, channels, height, width), at least float32.
        term: The term that guidance added at the last guided step to each picture's rows of the
            denoiser's output: of their shape, with scale, limit and rescaling applied, at least
            float32. `None` before that step.
        noted: Tensors that the last weakened pass recorded, by name: "attention" and "mask" of
            `SelfAttentionGuidance`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        pipeline: Any,
        guidances: tuple[Guidance, ...],
        run: Run,
        scheduler: Scheduler | None,
        batch_layout: BatchLayout | None,
    ) -> None:
        """Attach the guidance; use `attach` instead."""
        self.guidances = guidances
        self._numbers = tuple(range(len(guidances)))
        self._layers = [each.reads(denoiser) for each in guidances]
        self.attached = True
        self.steps = 0
        self.x0: Tensor | None = None
        self.term: Tensor | None = None
        self.noted: dict[str, Tensor] = {}
        # A pipeline refers to its handle, so the handle refers weakly to it. NoneType() is None.
        self._pipeline: Any = NoneType if pipeline is None else weakref.ref(pipeline)
        self._scheduler = scheduler
        self._layout: BatchLayout | None = batch_layout
        self._each = _EachDenoiser({denoiser: _OneDenoiser(run)})
        self._is_for_one_call = self._has_begun = False
        self._hooks = self._hooked(denoiser)

    @property
    def guidance(self) -> Any:
        """The settings of the first guidance."""
        return self.guidances[0]

    @property
    def attention(self) -> Tensor | None:
        """Attention that each position received at the last weakened pass that read attention.

        Shape (pictures, rows, columns), float32, mean 1; `None` if no pass has read it.
        """
        return self.noted.get("attention")

    @property
    def mask(self) -> Tensor | None:
        """The positions that it blurred, (pictures, rows, columns) bool; `None` without a mask."""
        return self.noted.get("mask")

    def remove(self) -> None:
        """Restore the denoiser, bit for bit; idempotent. The handle keeps its values."""
        if self._is_for_one_call and not self.attached:
            return  # the denoiser may be in the call of the next handle
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        for one in [*self._each.values()]:
            one.stop_reading()
            if not self._is_for_one_call:  # otherwise the next handle continues the run
                one.run.end()

    def remove_after_call(
        self, earlier: GuidanceHandle | None = None, numbers: Sequence[int] | None = None
    ) -> None:
        """Guide one call only, even if it fails.

        Args:
            earlier: The handle of an earlier call, whose run this one continues.
            numbers: Numbers of the guidances that act in this call; `None` is all.
        """
        self._is_for_one_call = True
        if earlier is not None:
            same = {each: earlier._each.get(each, own) for each, own in self._each.items()}
            self._each.update(same)
        self._numbers = self._numbers if numbers is None else tuple(numbers)

    def __enter__(self) -> GuidanceHandle:
        """Return the handle; the denoiser is already guided."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Remove the guidance; raise an error if the pipeline got another denoiser meanwhile."""
        present = denoiser_of(self._pipeline()) if self.attached else None
        is_guided = present is None or self in _handles_on(present)
        self.remove()
        if error is None and not is_guided:
            raise GuidanceError(
                f"{type(self._pipeline()).__name__} got another denoiser after guidance was "
                "attached; its pictures since then are not guided: attach again after the change"
            )

    def __deepcopy__(self, memo: object) -> GuidanceHandle:
        """Return the handle itself: a copied denoiser keeps this handle."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process, so that a guided denoiser can be pickled."""
        return self.__dict__ | {"_pipeline": NoneType}

    # The hooks

    def _hooked(self, denoiser: nn.Module) -> list[Any]:
        for layer in itertools.chain(*self._layers):
            self_attention(denoiser, layer)
        with _attaching:
            for handle in _handles_on(denoiser):
                if handle.attached:
                    by = " and ".join(str(guidance) for guidance in handle.guidances)
                    name = type(denoiser).__name__
                    raise ValueError(
                        f"{name} is guided already, by {by}; remove that handle first, or call"
                        " `detach`. A pipeline that guides its own calls needs sag_scale=0 beside a"
                        " handle"
                    )
            refuse_compiled_in_place(denoiser)
            refuse_caches(denoiser)
            if uncompiled(denoiser) is not denoiser:
                _behind_compiled[uncompiled(denoiser)] = self
            return [
                denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
                denoiser.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    @run_uncompiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        one = self._each.of(module)
        run = one.run
        if not self.attached or (run.is_weak and run.is_inside()):
            return
        run.enter(module)
        if self._is_for_one_call and self._has_begun:  # Ctrl-C interrupted the one call
            self.remove()
            return
        self._has_begun = True
        one.stop_reading()
        call, caller = call_of(module, args, kwargs), find_caller(self._pipeline())
        if caller is not None:
            caller.refuse_not_drawing()
        run.at(call, caller, self._scheduler)
        if run.is_new:
            refuse_caches(module)
            for guidance in self.guidances:
                check_window(guidance, run)
        for guidance in self.guidances:
            if guidance.scale != 0 and guidance.depends_on_step:
                run.refuse_several_timesteps(call, guidance)
            if guidance.scale != 0 and guidance.counts_steps:
                run.refuse_skipped_steps(guidance)
        acting = [n for n in self._numbers if acts(self.guidances[n], run, run.step)]
        if acting:
            one.guided_call = self._begin(one, module, call, caller, acting)
        else:
            run.read_checks()

    def _begin(
        self,
        one: _OneDenoiser,
        denoiser: nn.Module,
        call: Call,
        caller: Caller | None,
        numbers: list[int],
    ) -> GuidedCall:
        """Find a call's layout and what each guidance needs from it, and start reading that."""
        run = one.run
        layout = layout_of(call, caller, self._layout) or run.layout(denoiser, call, caller)
        run.compare(call, caller, layout, len(numbers))
        acting: dict[int, tuple[Guidance, Tensor | None, tuple[str, ...]]] = {}
        for number in numbers:
            guidance = self.guidances[number]
            # A held term, too: it is limited and rescaled by its own branch's prediction.
            if not run.two_calls.needs_term(layout, guidance.branch):
                continue
            shape = call.sample[layout.rows(len(call.sample), guidance.branch)].shape
            held = run.held(number, guidance.every, shape, 2 if layout.has_two_calls else 1)
            acting[number] = guidance, held, self._layers[number] if held is None else ()
        layers = {layer for *_, layers in acting.values() for layer in layers}
        read = {n: one.reading.enter_context(standing_in(denoiser, n)) for n in layers}
        guided_call = GuidedCall(run, denoiser, call, layout, acting, read)
        one.joint = guided_call.joint
        one.reading.enter_context(guided_call.first_pass())
        return guided_call

    @run_uncompiled
    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        one = self._each.of(module)
        run = one.run
        if run.is_weak or not run.is_inside():
            return None
        try:
            guided_call = one.stop_reading()
            if output is None and one.joint is not None:
                one.joint.end()
            if guided_call is None or output is None:  # not guided; or the pass raised an error
                return None
            return with_first(output, self._guided(guided_call, stacked(output[0])))
        finally:
            one.joint = None
            run.leave()
            if self._is_for_one_call:
                self.remove()

    def _guided(self, guided_call: GuidedCall, whole: Tensor) -> Tensor:
        """Return the denoiser's output with the terms of all guidances."""
        terms, steps = guided_call.terms(whole)
        for step in steps:
            self.x0 = step.x0.detach()
            self.noted |= {name: each.detach() for name, each in step.noted.items()}
            self.steps += 1
        if guided_call.layout.has_two_calls:
            guided, terms = guided_call.run.two_calls.finish(whole, terms)
        else:
            guided = added(whole, terms)
        self.term = total(terms).detach() if terms else self.term
        guided_call.check(whole, terms, guided)
        return guided


def _refuse_mixed_limits(guidances: Sequence[Guidance]) -> None:
    """Refuse different limits: the sum of all terms is limited and rescaled, on one branch."""
    names = ("rescale", "norm_limit", "branch")
    asked = {tuple(getattr(each, n) for n in names): each for each in guidances if each.scale != 0}
    if len(asked) > 1 and any(each.rescale or each.norm_limit for each in asked.values()):
        found = (", ".join(map("{}={!r}".format, names, values)) for values in asked)
        raise ValueError(
            "guidances are limited and rescaled together: give them one rescale, one norm_limit "
            f"and one branch, not {' and '.join(found)}"
        )


def _handles_on(denoiser: nn.Module) -> list[GuidanceHandle]:
    """Return the handles that guide a denoiser, or the module that it is compiled from."""
    modules = {denoiser, uncompiled(denoiser)}
    hooks = [hook for module in modules for hook in module._forward_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    owners.append(_behind_compiled.get(denoiser))
    return [owner for owner in owners if isinstance(owner, GuidanceHandle)]
