"""Which run of a sampler a call belongs to, which step, and whose thread: one object knows."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .call import Call, Layout, halves_agree, layout_by_samples
from .caller import Caller, is_running
from .noise import Prediction, Schedule, Scheduler, check_scheduler, is_elsewhere
from .outputs import TwoCalls


class _Held(NamedTuple):
    """A term between weakened passes, in units of the noise; `None` if it could not be held."""

    noise: Tensor | None
    shape: torch.Size
    step: int
    passes: int


class Run:
    """A run of a sampler, from its first call of the denoiser to its last.

    `step` is the index of the present one among the timesteps; `is_new` holds at the run's first
    call, and `is_weak` in the weakened pass. A run belongs to the thread of its first call. If
    another thread begins one before it is over, its next call is refused.
    """

    def __init__(self, is_for_this_thread: bool = False) -> None:
        self.step = 0
        self.is_new = self.is_weak = self._has_waited = False
        self._is_fixed = is_for_this_thread
        self._owner = threading.current_thread() if is_for_this_thread else None
        self._interrupted: dict[threading.Thread, int] = {}
        self._entering = threading.Lock()
        self._inside: threading.Thread | None = None
        self.end()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there are other threads and runs."""
        return Run, (False,)

    def end(self) -> None:
        """Nothing runs, and no tensor of a run is kept."""
        self._schedules: list[Schedule] = []
        self._begin(Schedule(None))

    def _begin(self, schedule: Schedule) -> None:
        """Nothing is known of a run but its scheduler."""
        self.schedule = schedule
        self.two_calls = TwoCalls()
        self._previous: Call | None = None
        self._held: dict[int, _Held] = {}
        self._layouts: dict[int, Layout] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._checks: list[tuple[Tensor, Callable[[], Exception]]] = []

    # Threads

    def enter(self, denoiser: nn.Module) -> None:
        """A call of the denoiser begins; refuses another thread's."""
        thread = threading.current_thread()
        if self._is_fixed and thread is not self._owner:
            raise RuntimeError(_TWO_THREADS)
        with self._entering:
            # After Ctrl-C, an earlier call may never have ended: of this thread, or of another.
            inside = None if self.is_inside() else self._inside
            if inside is not None and is_running(denoiser, inside):
                raise RuntimeError(_TWO_THREADS)
            self._inside, self.is_weak = thread, False

    def leave(self) -> None:
        self._inside = None

    def is_inside(self) -> bool:
        """Whether a call of this thread has begun and not ended."""
        return self._inside is threading.current_thread()

    def _take(self, timesteps: Tensor, step: int) -> None:
        """The run is this thread's."""
        thread = threading.current_thread()
        if thread is not self._owner:
            # A run that begins has other timesteps, or begins at an earlier one of the same.
            continued = min(self.step, self._interrupted.pop(thread, self.step))
            if timesteps is self.schedule.timesteps and step > continued:
                raise RuntimeError(_TWO_THREADS)
            if self._owner is not None and self.step < len(self.schedule) - 1:
                self._interrupted[self._owner] = self.step
        self._owner = thread

    # Steps

    def at(self, call: Call, caller: Caller | None, given: Scheduler | None) -> None:
        """The call is at a step of the scheduler that was given, or of one of the caller's."""
        self._has_waited = False
        schedule = self._schedule_at(call, caller) if given is None else self._schedule_of(given)
        is_other = schedule is not self.schedule
        if is_other:
            check_scheduler(schedule.scheduler)
        step, is_certain = self._step_of(call, schedule)
        self._take(schedule.timesteps, step)
        self.is_new = is_other or step < self.step
        if self.is_new:
            self._begin(schedule)
        elif step > self.step:
            self._previous = None
        self.step = step
        if not is_certain:
            self._check_timestep(call)

    def _schedule_at(self, call: Call, caller: Caller | None) -> Schedule:
        """That of the pipeline's scheduler which is at the call's timestep."""
        schedulers = [] if caller is None else caller.schedulers
        if not schedulers:
            raise RuntimeError(
                "no pipeline runs this denoiser, so its scheduler is unknown; for a loop of your "
                "own, attach to it with scheduler= and batch_layout="
            )
        if len(schedulers) == 1:
            return self._schedule_of(schedulers[0])
        self._note_wait(call.timestep)
        for scheduler in schedulers:
            is_set = getattr(scheduler, "num_inference_steps", None) is not None
            if is_set and self._schedule_of(scheduler).is_at(call.timesteps[0]):
                return self._schedule_of(scheduler)
        raise _not_at(schedulers[0], call, call.timestep)

    def _schedule_of(self, scheduler: Scheduler) -> Schedule:
        """The state of a scheduler's timesteps, which every run sets anew."""
        for known in (self.schedule, *self._schedules):
            if known.scheduler is scheduler and known.is_current:
                return known
        schedule = Schedule(scheduler)
        self._has_waited |= schedule.has_waited
        self._schedules = [*self._schedules[-3:], schedule]
        return schedule

    def _step_of(self, call: Call, schedule: Schedule) -> tuple[int, bool]:
        """The step that a call is at, and whether its timestep is surely that."""
        # Pipelines take the timestep out of the scheduler's own tensor.
        is_own = call.given(1.0) == 1  # else it was computed from it
        place = schedule.place_of(call.timestep) if is_own else None
        step = schedule.own_step()
        if step is None and place is not None:
            # PNDM evaluates a timestep twice, and does not say which time it is.
            return schedule.equal_to(place)[0], True
        if step is None:
            self._note_wait(call.timestep)
            step = schedule.step_at(call.timesteps[0])
        if not 0 <= step < len(schedule):
            raise _not_at(schedule.scheduler, call, call.timestep)
        return step, step == place

    def _check_timestep(self, call: Call) -> None:
        """Refuse a scheduler that is elsewhere, and several timesteps where it has one level."""
        scheduler, given = self.schedule.scheduler, torch.as_tensor(call.timestep)
        values = given.flatten()
        expected = call.given(self.schedule.tables["timesteps"][self.step])
        if self.schedule.has_sigmas:
            name = type(scheduler).__name__
            several = f"the pictures of the batch have several timesteps, but {name} has one noise"
            message = f"{several} level; use DDIMScheduler, or one timestep a call"
            self.refuse((values != values[0]).any(), ValueError, message)
        # What networks receive may be rounded.
        if given.is_floating_point():
            largest = max(abs(expected), call.family.timestep_offset)
            allowed = 2 * torch.finfo(given.dtype).eps * largest + 1e-6
        else:
            allowed = 0.0 if expected == round(expected) else 1.0
        is_elsewhere = (values[0] - expected).abs() > allowed
        self.refuse(is_elsewhere, _not_at, scheduler, call, values[0])

    def prediction(self, call: Call) -> Prediction:
        timesteps = self.schedule.tables["timesteps"][self.step : self.step + 1]
        if not self.schedule.has_sigmas and not call.has_one_timestep:
            self._note_wait(call.timestep)
            timesteps = call.timesteps if len(call.timesteps) > 1 else timesteps
        prediction = self.schedule.prediction(self.step, timesteps, call.sample)
        return prediction.negated() if call.family.is_negated else prediction

    # What lies on the device

    def on_cpu(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the CPU, made once a run."""
        for known, copy in self._copies:
            if known is tensor:
                return copy
        self._note_wait(tensor)
        self._copies = [*self._copies[-3:], (tensor, tensor.cpu())]
        return self._copies[-1][1]

    def refuse(self, failed: Tensor, error: Callable[..., Exception], *about: Any) -> None:
        """Raise `error(*about)` when the checks of the step are read, if `failed` is true then."""
        self._checks.append((failed.reshape(()), functools.partial(error, *about)))

    def read_checks(self) -> None:
        """Wait for the device once a step, and raise the first error.

        A step that has waited for it already leaves that to the next one, if there is one.
        """
        if not self._checks or (self._has_waited and self.step < len(self.schedule) - 1):
            return
        checks, self._checks = self._checks, []
        failed = torch.stack([each for each, _ in checks]).cpu().tolist()
        for has_failed, (_, error) in zip(failed, checks, strict=True):
            if has_failed:
                raise error()

    def _note_wait(self, value: Any) -> None:
        self._has_waited |= is_elsewhere(value)

    # What the batch holds, and what the calls of a step have in common

    def layout(self, denoiser: nn.Module, call: Call, caller: Caller | None) -> Layout:
        """The layout as the run's first batch of this size shows it (see `layout_by_samples`)."""
        batch = len(call.sample)
        if batch not in self._layouts:
            is_last = self.step == len(self.schedule) - 1
            self._layouts[batch] = layout_by_samples(denoiser, call, caller, is_last)
            self._note_wait(call.sample)
        return self._layouts[batch]

    def compare(self, call: Call, caller: Caller | None, layout: Layout, terms: int) -> None:
        """Compare a call with its layout and with the call before; its step wants so many terms."""
        before, self._previous = self._previous, call
        if layout.has_two_calls:
            cfg = None if caller is None else caller.cfg
            is_same = before is not None and before.sample is call.sample
            if before is not None and not is_same:
                self._note_wait(call.sample)
                is_same = torch.equal(before.sample, call.sample)
            self.two_calls.begin(is_same, cfg, terms)
        if layout.has_halves:
            layout.rows(len(call.sample), "cond")  # refuses an odd number of them
            reason = (
                f"batch_layout={layout.kind!r}" if layout.is_given else "they were the same before"
            )
            message = (
                f"the two halves of the batch hold different samples ({reason}); {_WITHOUT_CFG}"
            )
            self.refuse(~halves_agree(call.sample), ValueError, message)
        elif before is not None and not layout.is_given:
            pairs = (before.sample, call.sample), (before.condition, call.condition)
            if all(a is not None and b is not None and a.shape == b.shape for a, b in pairs):
                same, alike = ((a == b).all() for a, b in pairs)
                self.refuse(same & ~alike, ValueError, _SEVERAL_CALLS)

    # Terms that are held

    def hold(self, number: int, noise: Tensor | None, shape: torch.Size) -> None:
        """Hold what a guidance's weakened pass at x_t of a shape gave, as noise."""
        before, passes = self._held.get(number), 1
        # Schedulers that evaluate one timestep twice may not say which time it is.
        is_unique = len(self.schedule.equal_to(self.step)) == 1
        if before is not None and before.step == self.step and is_unique:
            passes += before.passes
        self._held[number] = _Held(noise, shape, self.step, passes)

    def held(self, number: int, every: int, shape: torch.Size, passes: int) -> Tensor | None:
        """The noise that a guidance adds again, or `None` if it needs a weakened pass."""
        held = self._held.get(number)
        if held is None or held.shape != shape or not 0 < self.step - held.step < every:
            return None
        if held.passes > passes:  # several pictures are denoised in turn
            calls = f"the denoiser is called {held.passes} times a step"
            raise RuntimeError(f"{calls}, so a held term may be another picture's; use every=1")
        return held.noise


def _not_at(scheduler: Scheduler, call: Call, timestep: Any) -> ValueError:
    at = call.counted(float(torch.as_tensor(timestep).flatten()[0]))
    return ValueError(
        f"{type(scheduler).__name__} is not at timestep {at:g}, with which the denoiser is called: "
        "attach guidance to the pipeline that runs, or to the denoiser with its scheduler="
    )


_TWO_THREADS = "two threads call one guided denoiser: let them take turns, or give each its own"
_WITHOUT_CFG = "without classifier-free guidance, attach with batch_layout='single'"
_SEVERAL_CALLS = (
    "the denoiser is called twice at one step with the same sample and two conditions: attach with "
    "batch_layout='uncond_call_first' or 'cond_call_first' if this is classifier-free guidance, or "
    "with 'single' if these are two pictures of one seed"
)
