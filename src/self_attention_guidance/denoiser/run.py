"""Which run of a sampler a call belongs to, which step, and whose thread: one object knows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .call import Call
from .caller import Caller, is_running
from .layout import Layout, halves_agree, layout_by_samples
from .noise import Prediction, Tables, check_scheduler, index_of, is_at, place_in, prediction_at
from .protocols import Scheduler


@dataclass(frozen=True)
class Held:
    """A term between weakened passes.

    Attributes:
        noise: In units of the noise; `None` if it could not be held.
        shape: Of x_t.
        step: Index of the step that made it.
        passes: How many weakened passes that step had.
    """

    noise: Tensor | None
    shape: torch.Size
    step: int
    passes: int


class Run:
    """A run of a sampler, from its first call of the denoiser to its last.

    A run belongs to the thread of its first call. Another thread may begin one when it is over,
    and a run that it begins earlier ends the first: that one's next call is refused.

    Attributes:
        tables: The scheduler's tables, on the CPU.
        step: Index of the present step among the timesteps.
        is_new: Whether the present call is the run's first.
    """

    def __init__(self, is_for_this_thread: bool = False) -> None:
        """Nothing runs yet.

        Args:
            is_for_this_thread: Whether all runs are of the thread that makes this.
        """
        self.tables = Tables(None)
        self.step = 0
        self.is_new = False
        self._scheduler: Scheduler | None = None
        self._timesteps: Tensor | None = None
        self._held: dict[int, Held] = {}
        self._layouts: dict[int, Layout] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._is_repeat = self._has_waited = False
        self._previous: Call | None = None
        self._checks: list[tuple[Tensor, Callable[[], Exception]]] = []
        self._is_fixed = is_for_this_thread
        self._owner = threading.current_thread() if is_for_this_thread else None
        self._interrupted: dict[threading.Thread, int] = {}
        self._busy = threading.Lock()
        self._inside: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there are other threads and runs."""
        return Run, (False,)

    # Threads

    def enter(self, denoiser: nn.Module) -> None:
        """A call of the denoiser begins.

        Raises:
            RuntimeError: It is another thread's.
        """
        thread = threading.current_thread()
        if self._is_fixed and thread is not self._owner:
            raise _two_threads()
        # After Ctrl-C, an earlier call may never have ended: of this thread, or of another one.
        if not self.is_inside() and not self._busy.acquire(blocking=False):
            inside = self._inside
            if inside is not None and is_running(denoiser, inside):
                raise _two_threads()
        self._inside = thread

    def is_inside(self) -> bool:
        """Whether a call of this thread has begun and not ended."""
        return self._inside is threading.current_thread()

    def leave(self) -> None:
        """The call that this thread began ends."""
        self._inside = None
        self._busy.release()

    def _take(self, timesteps: Tensor, step: int) -> None:
        """The run is this thread's."""
        thread = threading.current_thread()
        if thread is not self._owner:
            # A run that begins has other timesteps, or begins at an earlier one of the same.
            continued = min(self.step, self._interrupted.pop(thread, self.step))
            if timesteps is self._timesteps and step > continued:
                raise _two_threads()
            if self._owner is not None and self.step < len(self.tables) - 1:
                self._interrupted[self._owner] = self.step
        self._owner = thread

    # Steps

    def at(self, call: Call, caller: Caller | None, given: Scheduler | None) -> None:
        """The call is at a step of a scheduler.

        Args:
            call: Of the denoiser.
            caller: The pipeline that runs, if any.
            given: The scheduler that the user gave, if any.

        Raises:
            ValueError: No scheduler is at the call's timestep, or it is not supported.
            RuntimeError: The call continues another thread's run, or no pipeline runs.
        """
        self._has_waited = False
        scheduler = _scheduler_of(call, caller) if given is None else given
        tables = self.tables
        # Every run of a scheduler has other timesteps.
        is_other = scheduler is not self._scheduler or scheduler.timesteps is not self._timesteps
        if is_other:
            check_scheduler(scheduler)
            tables = Tables(scheduler)
            self._has_waited = tables.has_waited
        # Pipelines take the timestep out of the scheduler's own tensor.
        place = place_in(scheduler.timesteps, call.timestep) if call.timestep_scale == 1 else None
        step = index_of(scheduler)
        if step is None and place is not None:
            # PNDM evaluates a timestep twice, and does not tell which time it is.
            step = place = tables.first_equal(place)
        elif step is None:
            step = tables.nearest(scheduler, float(self._timesteps_of(call)[0]))
        if not 0 <= step < len(tables):
            raise _not_at(scheduler, call)
        self._take(scheduler.timesteps, step)
        self.is_new = is_other or step < self.step
        self._is_repeat = not self.is_new and step == self.step
        if self.is_new:
            self._scheduler, self._timesteps, self.tables = scheduler, scheduler.timesteps, tables
            self._held, self._layouts, self._copies, self._checks = {}, {}, [], []
            self._previous = None
        self.step = step
        if step != place:
            self._check_timestep(scheduler, call)

    def prediction(self, call: Call, like: Tensor) -> Prediction:
        """What the scheduler says of the call; `like` tells the device and the precision."""
        assert self._scheduler is not None
        steps = self.tables["timesteps"][self.step : self.step + 1]
        if not hasattr(self._scheduler, "sigmas") and not call.has_one_timestep:
            several = self._timesteps_of(call)
            steps = several if len(several) > 1 else steps
        return prediction_at(self._scheduler, self.step, steps, self.tables, like)

    def _timesteps_of(self, call: Call) -> Tensor:
        self._note_wait(call.timestep)
        return call.timesteps()

    def _check_timestep(self, scheduler: Scheduler, call: Call) -> None:
        """Refuse a scheduler that is elsewhere, and several timesteps where it has one level."""
        given = torch.as_tensor(call.timestep)
        values = given.flatten()
        expected = float(self.tables["timesteps"][self.step]) * call.timestep_scale
        if hasattr(scheduler, "sigmas"):
            name = type(scheduler).__name__
            self.refuse((values != values[0]).any(), lambda: _several_timesteps(name))
        # What networks receive may be rounded.
        if given.is_floating_point():
            allowed = 2 * torch.finfo(given.dtype).eps * abs(expected) + 1e-6
        else:
            allowed = 0.0 if expected == round(expected) else 1.0
        is_elsewhere = (values[0] - expected).abs() > allowed
        self.refuse(is_elsewhere, lambda: _not_at(scheduler, call))

    # What lies on the device

    def on_cpu(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the CPU, made once a run."""
        for known, copy in self._copies:
            if known is tensor:
                return copy
        self._note_wait(tensor)
        self._copies = [*self._copies[-3:], (tensor, tensor.cpu())]
        return self._copies[-1][1]

    def refuse(self, failed: Tensor, error: Callable[[], Exception]) -> None:
        """Raise an error when the checks of the step are read, if `failed` is true then."""
        self._checks.append((failed.reshape(()), error))

    def read_checks(self) -> None:
        """Wait for the device once a step, and raise the first error.

        A step that has waited for it already leaves that to the next one, if there is one.
        """
        if not self._checks or (self._has_waited and self.step < len(self.tables) - 1):
            return
        checks, self._checks = self._checks, []
        for has_failed, (_, error) in zip(_together(checks), checks, strict=True):
            if has_failed:
                raise error()

    def _note_wait(self, value: Any) -> None:
        self._has_waited |= isinstance(value, Tensor) and value.device.type != "cpu"

    # What the batch holds, and what the calls of a step have in common

    def layout(self, denoiser: nn.Module, call: Call, caller: Caller | None) -> Layout:
        """The layout as the run's first batch of this size shows it (see `layout_by_samples`)."""
        batch = len(call.sample)
        if batch not in self._layouts:
            is_last = self.step == len(self.tables) - 1
            self._layouts[batch] = layout_by_samples(denoiser, call, caller, is_last)
            self._note_wait(call.sample)
        return self._layouts[batch]

    def is_same_sample(self, call: Call) -> bool:
        """Whether the call before was at the same step with the same x_t."""
        before = self._previous.sample if self._is_repeat and self._previous else None
        if before is None or before is call.sample:
            return before is not None
        self._note_wait(before)
        return before.shape == call.sample.shape and torch.equal(before, call.sample)

    def compare(self, call: Call, layout: Layout) -> None:
        """Compare a call with its layout, and with the call before."""
        before, self._previous = self._previous if self._is_repeat else None, call
        if layout.has_halves:
            self.refuse(~halves_agree(call.sample), lambda: _no_halves(layout))
        if before is None or layout.is_told or layout.has_halves:
            return
        pairs = ((before.sample, call.sample), (before.condition, call.condition))
        if all(a is not None and b is not None and a.shape == b.shape for a, b in pairs):
            (x, x_now), (condition, condition_now) = pairs
            again = (x == x_now).all() & (condition != condition_now).any()  # type: ignore[union-attr]
            self.refuse(again, _several_calls)

    # Terms that are held

    def hold(self, number: int, noise: Tensor | None, shape: torch.Size) -> None:
        """Hold the term of a weakened pass of the present step.

        Args:
            number: Of the guidance.
            noise: The term in units of the noise; `None` can't be held.
            shape: Of x_t.
        """
        before = self._held.get(number)
        # Schedulers that evaluate one timestep twice may not tell which time it is.
        is_again = before is not None and before.step == self.step
        is_again = is_again and self.tables.is_unique(self.step)
        passes = before.passes + 1 if before is not None and is_again else 1
        self._held[number] = Held(noise, shape, self.step, passes)

    def held(self, number: int, every: int, shape: torch.Size, passes: int) -> Tensor | None:
        """The term that a step adds again, as noise, or `None` if it needs a weakened pass.

        Args:
            number: Of the guidance.
            every: From one weakened pass to the next, in timesteps.
            shape: Of x_t.
            passes: How many weakened passes a step of one picture may have.

        Raises:
            RuntimeError: Several samples are denoised in turn, so the term may be another's.
        """
        held = self._held.get(number)
        if held is None or held.shape != shape or not 0 < self.step - held.step < every:
            return None
        if held.passes > passes:
            raise RuntimeError(
                f"the denoiser is called {held.passes} times a step, so a term that is held may "
                "be another picture's; use every=1"
            )
        return held.noise


def _together(checks: list[tuple[Tensor, Callable[[], Exception]]]) -> list[bool]:
    return torch.stack([failed for failed, _ in checks]).cpu().tolist()


def _scheduler_of(call: Call, caller: Caller | None) -> Scheduler:
    """The scheduler of the pipeline that is at the call's timestep."""
    schedulers = [] if caller is None else caller.schedulers
    if not schedulers:
        raise RuntimeError(
            "no pipeline is running, so the scheduler and the batch layout are unknown; to call "
            "the denoiser in a loop of your own, attach to it with scheduler= and batch_layout="
        )
    if len(schedulers) == 1:
        return schedulers[0]
    timestep = float(call.timesteps()[0])
    found = next((each for each in schedulers if is_at(each, timestep)), None)
    if found is None:
        raise _not_at(schedulers[0], call)
    return found


def _two_threads() -> RuntimeError:
    return RuntimeError(
        "two threads call one guided denoiser: let them wait for each other, or give each a "
        "pipeline with a denoiser of its own"
    )


def _not_at(scheduler: Scheduler, call: Call) -> ValueError:
    return ValueError(
        f"{type(scheduler).__name__} is not at timestep {float(call.timesteps()[0]):g}, with which "
        "the denoiser is called, so the noise level is unknown: attach guidance to the pipeline "
        "that runs, or to the denoiser with the scheduler= that runs"
    )


def _several_timesteps(scheduler: str) -> ValueError:
    return ValueError(
        f"the pictures of the batch have several timesteps, but {scheduler} has one noise level; "
        "use DDIMScheduler, or one timestep a call"
    )


def _several_calls() -> ValueError:
    return ValueError(
        "the denoiser is called twice at one step with the same sample and two conditions, as "
        "under classifier-free guidance: attach with batch_layout='uncond_call_first' or "
        "'cond_call_first', which is the order of the calls, or with 'single' if these are two "
        "pictures of one seed"
    )


def _no_halves(layout: Layout) -> ValueError:
    if layout.is_told:
        return ValueError(
            "the batch has no conditional and unconditional half: its halves hold different "
            f"samples (batch_layout={layout.kind!r})"
        )
    return ValueError(
        "the halves of the batch held the same samples, but no longer do: without classifier-free "
        "guidance, attach with batch_layout='single'"
    )
