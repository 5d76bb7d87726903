"""The run of a sampler: the step of each call, its thread, and what is kept between calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import GuidanceError
from .call import Call, Layout, halves_agree, have_other_conditions, layout_by_samples
from .caller import Caller, is_running
from .noise import Prediction, Schedule, Scheduler, check_scheduler, is_elsewhere
from .outputs import TwoCalls


class _Held(NamedTuple):
    """A term kept between weakened passes, in units of the noise; `None` if that is impossible."""

    noise: Tensor | None
    shape: torch.Size
    step: int
    passes: int


class _Interrupted(NamedTuple):
    """The last step of a run that another thread interrupted, and if a part of it is unguided."""

    step: int
    is_owed: bool


class Run:
    """A run of a sampler, from its first call of the denoiser to its last.

    `step` is the index of the present timestep; `is_new` is true at the run's first call, and
    `is_weak` during a weakened pass. A run belongs to the thread of its first call. If another
    thread begins a run before this one is over, the next call of this one is refused.
    """

    def __init__(self, is_for_this_thread: bool = False) -> None:
        self.step = 0
        self.is_new = self.is_weak = self._has_waited = self._skips = False
        self._is_fixed = is_for_this_thread
        self._owner = threading.current_thread() if is_for_this_thread else None
        self._interrupted: WeakKeyDictionary[threading.Thread, _Interrupted] = WeakKeyDictionary()
        self._entering = threading.Lock()
        self._inside: threading.Thread | None = None
        self._timesteps: list[float] | None = None
        self.end()

    def end(self) -> None:
        """End the run, and drop all of its tensors."""
        self._schedules: list[Schedule] = []
        self._left_at: set[int] = set()
        self._turns: object = None
        self._begin(Schedule(None))

    def _begin(self, schedule: Schedule) -> None:
        """Begin a run, of which only the scheduler is known."""
        self.schedule = schedule
        self.two_calls = TwoCalls()
        self._previous: Call | None = None
        self._held: dict[int, _Held] = {}
        self._layouts: dict[int, Layout] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._checks: list[tuple[Tensor, Callable[[], Exception]]] = []
        self._failed: list[Callable[[], Exception]] = []
        self._are_put_off = False

    # Threads

    def enter(self, denoiser: nn.Module) -> None:
        """Begin a call of the denoiser; refuse it if another thread is inside one."""
        thread = threading.current_thread()
        if self._is_fixed and thread is not self._owner:
            raise GuidanceError(_TWO_THREADS)
        with self._entering:
            # Ctrl-C can leave a call without its end, in this thread or in another.
            inside = None if self.is_inside() else self._inside
            if inside is not None and is_running(denoiser, inside):
                raise GuidanceError(_TWO_THREADS)
            self._inside, self.is_weak = thread, False

    def leave(self) -> None:
        self._inside = None

    def is_inside(self) -> bool:
        """Whether a call of this thread has begun and not ended."""
        return self._inside is threading.current_thread()

    def _take(self, timesteps: Tensor, step: int) -> None:
        """Make the run this thread's; refuse a thread whose run was interrupted by another."""
        thread = threading.current_thread()
        if thread is not self._owner:
            # A new run has other timesteps, or starts at an earlier one of the same timesteps.
            own = self._interrupted.pop(thread, _Interrupted(self.step, False))
            is_same = timesteps is self.schedule.timesteps
            if (is_same and step > min(self.step, own.step)) or (own.is_owed and step >= own.step):
                raise GuidanceError(_TWO_THREADS)
            is_owed = self.two_calls.owes_guidance
            if self._owner is not None and (is_owed or self.step < len(self.schedule) - 1):
                self._interrupted[self._owner] = _Interrupted(self.step, is_owed)
        self._owner = thread

    # Steps

    def at(self, call: Call, caller: Caller | None, given: Scheduler | None) -> None:
        """Find the step of a call, of the given scheduler or else of one of the caller's."""
        self._has_waited, self._timesteps = False, None
        schedule = self._schedule_at(call, caller) if given is None else self._schedule_of(given)
        turns = None if caller is None else caller.turns
        if turns is not None and turns is self._turns:
            self.schedule = schedule
        self._turns = turns
        is_other = schedule is not self.schedule
        if is_other:
            check_scheduler(schedule.scheduler)
            schedule.check_set()
            self._left_at.clear()
        step, is_certain = self._step_of(call, schedule)
        self._take(schedule.timesteps, step)
        self.is_new = is_other or step < self.step
        self._skips = not (self.is_new or schedule.is_set) and step > self.step + 1
        if self.is_new:
            if not is_other:
                self._left_at.add(self.step)
            self._begin(schedule)
        elif step > self.step:
            self._previous = None
            self._forget_other_pictures(step)
        self.step = step
        if not is_certain:
            self._check_timestep(call)

    def _forget_other_pictures(self, step: int) -> None:
        """Drop held terms where the run passes a step at which an earlier run was left.

        A loop of one's own may draw several pictures up to a step and go on with any of them.
        """
        passed = {left for left in self._left_at if self.step <= left < step}
        if passed:
            self._left_at -= passed
            self._held.clear()

    def _schedule_at(self, call: Call, caller: Caller | None) -> Schedule:
        """Find the schedule of the pipeline's scheduler that is at the call's timestep."""
        schedulers = [] if caller is None else caller.schedulers
        if not schedulers:
            raise GuidanceError(
                "no pipeline runs this denoiser, so its scheduler is unknown; for a loop of your "
                "own, attach to it with scheduler= and batch_layout="
            )
        if len(schedulers) == 1:
            return self._schedule_of(schedulers[0])
        timestep = self._timesteps_of(call)[0]
        for scheduler in schedulers:
            schedule = self._schedule_of(scheduler)
            if schedule.is_set and schedule.is_at(timestep):
                return schedule
        raise _not_at(schedulers[0], call, call.timestep)

    def _schedule_of(self, scheduler: Scheduler) -> Schedule:
        """Return the schedule of a scheduler's present timesteps, which each run sets again."""
        for known in (self.schedule, *self._schedules):
            if known.scheduler is scheduler and known.is_current:
                return known
        schedule = Schedule(scheduler)
        self._has_waited |= schedule.has_waited
        self._schedules = [*self._schedules[-3:], schedule]
        return schedule

    def _step_of(self, call: Call, schedule: Schedule) -> tuple[int, bool]:
        """Find the step of a call, and whether its timestep is known to be the one of this step."""
        # Pipelines take the timestep from the scheduler's own tensor, or compute it from there.
        is_own = call.given(1.0) == 1
        place = schedule.place_of(call.timestep) if is_own else None
        step = schedule.own_step()
        if step is None and place is not None:
            # PNDM evaluates one timestep twice, and does not say if this is the first time.
            return schedule.equal_to(place)[0], True
        if step is None:
            step = schedule.step_at(self._timesteps_of(call)[0])
        if not 0 <= step < len(schedule):
            raise _not_at(schedule.scheduler, call, call.timestep)
        return step, step == place

    def _check_timestep(self, call: Call) -> None:
        """Refuse a timestep that is not the scheduler's, or several if it has one noise level."""
        scheduler, given = self.schedule.scheduler, torch.as_tensor(call.timestep)
        values = given.flatten()
        expected = call.given(self.schedule.tables["timesteps"][self.step])
        if self.schedule.has_sigmas:
            name = type(scheduler).__name__
            several = f"the pictures of the batch have several timesteps, but {name} has one noise"
            message = f"{several} level; use DDIMScheduler, or one timestep a call"
            self.refuse((values != values[0]).any(), ValueError, message)
        # The timestep that networks receive may be rounded.
        if given.is_floating_point():
            largest = max(abs(expected), call.family.timestep_offset)
            allowed = 2 * torch.finfo(given.dtype).eps * largest + 1e-6
        else:
            allowed = 0.0 if expected == round(expected) else 1.0
        is_elsewhere = (values[0] - expected).abs() > allowed
        self.refuse(is_elsewhere, _not_at, scheduler, call, values[0])

    def refuse_several_timesteps(self, call: Call, guidance: object) -> None:
        """Refuse pictures at several timesteps: they would all be guided as the first of them."""
        if not call.has_one_timestep:
            values = torch.as_tensor(call.timestep).flatten()
            message = (
                "the pictures of the batch have several timesteps: give each call one timestep, "
                f"because the effect of {guidance} depends on the step"
            )
            self.refuse((values != values[0]).any(), ValueError, message)

    def refuse_skipped_steps(self, guidance: object) -> None:
        """Refuse to count the steps of a scheduler that was not set, where a call skipped some."""
        if self._skips:
            scheduler = self.schedule.scheduler
            raise ValueError(
                f"{type(scheduler).__name__} has {len(self.schedule)} timesteps, of which the last "
                f"call skipped some, so {guidance} can't count the steps: call its set_timesteps, "
                "or attach with the scheduler that runs"
            )

    def prediction(self, call: Call) -> Prediction:
        timesteps = self.schedule.tables["timesteps"][self.step : self.step + 1]
        if not self.schedule.has_sigmas and not call.has_one_timestep:
            given = self._timesteps_of(call)
            timesteps = given if len(given) > 1 else timesteps
        prediction = self.schedule.prediction(self.step, timesteps, call.sample)
        return prediction.negated() if call.family.is_negated else prediction

    # Values on the device

    def _timesteps_of(self, call: Call) -> list[float]:
        """Return the timesteps of the present call; a wait for them also reads earlier checks."""
        if self._timesteps is None:
            checks = self._checks if is_elsewhere(call.timestep) else []
            self._note_wait(call.timestep)
            self._timesteps, failed = call.timesteps([each for each, _ in checks])
            # Only `read_checks` raises them: if a new run begins, they are not its own.
            self._failed += [error for has, (_, error) in zip(failed, checks, strict=True) if has]
            if checks:
                self._checks, self._are_put_off = [], False
        return self._timesteps

    def on_cpu(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the CPU, once in each run."""
        for known, copy in self._copies:
            if known is tensor:
                return copy
        self._note_wait(tensor)
        self._copies = [*self._copies[-3:], (tensor, tensor.cpu())]
        return self._copies[-1][1]

    def refuse(self, failed: Tensor, error: Callable[..., Exception], *about: Any) -> None:
        """Add a check: `read_checks` raises `error(*about)` if `failed` is true."""
        self._checks.append((failed.reshape(()), functools.partial(error, *about)))

    def read_checks(self) -> None:
        """Read all checks with one wait for the device, and raise the first error.

        A step that has already waited for the device leaves its checks to the next step, if any.
        """
        if self._failed:
            raise self._failed.pop(0)()
        may_wait = not self._has_waited or self._are_put_off
        self._are_put_off = bool(self._checks) and not may_wait
        if not self._checks or not (may_wait or self.step == len(self.schedule) - 1):
            return
        checks, self._checks = self._checks, []
        remote = [each for each, _ in checks if is_elsewhere(each)]
        found = iter(torch.stack(remote).cpu().tolist() if remote else ())
        for each, error in checks:
            # A timestep may be on the CPU, and so is its check.
            if next(found) if is_elsewhere(each) else bool(each):
                raise error()

    def _note_wait(self, value: Any) -> None:
        self._has_waited |= is_elsewhere(value)

    # The layout of the batch, and comparisons of the calls of a step

    def layout(self, denoiser: nn.Module, call: Call, caller: Caller | None) -> Layout:
        """Find the layout from the run's first batch of this size (see `layout_by_samples`)."""
        batch = len(call.sample)
        if batch not in self._layouts:
            is_last = self.step == len(self.schedule) - 1
            self._layouts[batch] = layout_by_samples(denoiser, call, caller, is_last)
            self._note_wait(call.sample)
        return self._layouts[batch]

    def compare(self, call: Call, caller: Caller | None, layout: Layout, terms: int) -> None:
        """Check a call against its layout and the call before; its step needs `terms` terms."""
        before = self._previous
        needs_it = layout.has_two_calls or not layout.is_given
        self._previous = call if needs_it else None
        if layout.has_two_calls:
            cfg = None if caller is None else caller.cfg
            is_same = before is not None and before.sample is call.sample
            if before is not None and not is_same:
                self._note_wait(call.sample)
                is_same = torch.equal(before.denoised, call.denoised)
            is_last = self.step == len(self.schedule) - 1
            self.two_calls.begin(is_same, cfg, terms, is_last)
        if layout.has_halves:
            layout.rows(len(call.sample), "cond")  # refuses an odd number of them
            reason = (
                f"they count as {layout.kind!r}" if layout.is_given else "they were the same before"
            )
            message = (
                f"the two halves of the batch hold different samples ({reason}); {_WITHOUT_CFG}; "
                "several views of a panorama need view_batch_size=1"
            )
            self.refuse(~halves_agree(call.denoised), ValueError, message)
        elif (
            before is not None
            and not layout.is_given
            and before.denoised.shape == call.denoised.shape
        ):
            same = (before.denoised == call.denoised).all()
            differ = have_other_conditions(before, call)
            self.refuse(same & differ, ValueError, _SEVERAL_CALLS)

    # Held terms

    def hold(self, number: int, noise: Tensor | None, shape: torch.Size) -> None:
        """Hold the term of a guidance's weakened pass, as noise; `shape` is that of x_t."""
        before, passes = self._held.get(number), 1
        # Schedulers that evaluate one timestep twice may not say if this is the first time.
        is_unique = len(self.schedule.equal_to(self.step)) == 1
        if before is not None and before.step == self.step and is_unique:
            passes += before.passes
        self._held[number] = _Held(noise, shape, self.step, passes)

    def held(self, number: int, every: int, shape: torch.Size, passes: int) -> Tensor | None:
        """Return the noise that a guidance adds again, or `None` if it needs a weakened pass."""
        held = self._held.get(number)
        if held is None or held.shape != shape or not 0 < self.step - held.step < every:
            return None
        if held.passes > passes:  # several pictures are denoised by turns
            calls = f"the denoiser is called {held.passes} times a step"
            raise GuidanceError(f"{calls}, so a held term may be of another picture; use every=1")
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
