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
from .noise import (
    Prediction,
    Tables,
    check_scheduler,
    index_of,
    index_of_value,
    place_in,
    prediction_at,
)
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


class DeviceChecks:
    """Conditions whose answers lie on the device, all fetched at once."""

    def __init__(self) -> None:
        """Nothing to check."""
        self._failed: list[Tensor] = []
        self._errors: list[Callable[[], Exception]] = []

    def refuse(self, failed: Tensor, error: Callable[[], Exception]) -> None:
        """Raise an error when the answers are read.

        Args:
            failed: Bool, one number.
            error: Makes the error.
        """
        self._failed.append(failed.reshape(()))
        self._errors.append(error)

    def read(self) -> None:
        """Wait for the device, and raise the first error."""
        if not self._failed:
            return
        failed = torch.stack(self._failed).cpu().tolist()
        errors, self._failed, self._errors = self._errors, [], []
        for has_failed, error in zip(failed, errors, strict=True):
            if has_failed:
                raise error()


class Run:
    """A run of a sampler, from its first call of the denoiser to its last.

    A run belongs to the thread of its first call. Another thread may begin one when it is over,
    and a run that it begins earlier ends the first: that one's next call is refused.

    Attributes:
        scheduler: Whose timesteps the run goes through.
        tables: The scheduler's tables, on the CPU.
        step: Index of the present step among the timesteps.
        is_new: Whether the present call is the run's first.
        is_repeat: Whether the call before was at the same step.
        held: The terms that are held, by the number of their guidance.
        checks: Conditions to be read once a step.
    """

    def __init__(self, is_for_this_thread: bool = False) -> None:
        """Nothing runs yet.

        Args:
            is_for_this_thread: Whether all runs are of the thread that makes this.
        """
        self.scheduler: Scheduler | None = None
        self.step = 0
        self.is_new = self.is_repeat = False
        self.held: dict[int, Held] = {}
        self.checks = DeviceChecks()
        self._timesteps: Tensor | None = None
        self._tables: Tables | None = None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._layouts: dict[int, Layout] = {}
        self._has_waited = False
        self._previous: tuple[Tensor, Tensor | None] | None = None
        self._is_fixed = is_for_this_thread
        self._owner = threading.current_thread() if is_for_this_thread else None
        self._interrupted: dict[threading.Thread, int] = {}
        self._busy = threading.Lock()
        self._inside: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there are other threads and runs."""
        return Run, (False,)

    @property
    def tables(self) -> Tables:
        """The scheduler's tables, on the CPU."""
        assert self._tables is not None
        return self._tables

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.step == len(self.tables) - 1

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

    # Steps

    def at(self, call: Call, caller: Caller | None, given: Scheduler | None) -> None:
        """The call is at a step of a scheduler.

        Args:
            call: Of the denoiser.
            caller: The pipeline that runs, if any.
            given: The scheduler that the user gave, if any.

        Raises:
            ValueError: No scheduler is at the call's timestep, or it is not supported.
            RuntimeError: The call continues another thread's run.
        """
        self._has_waited = False
        scheduler = _scheduler_of(call, caller, given)
        # Every run of a scheduler has other timesteps.
        is_other = scheduler is not self.scheduler or scheduler.timesteps is not self._timesteps
        tables = self._tables
        if tables is None or is_other:
            check_scheduler(scheduler)
            tables = Tables(scheduler)
            self._has_waited = tables.waited
        # Pipelines take the timestep out of the scheduler's own tensor.
        place = place_in(scheduler.timesteps, call.timestep) if call.timestep_scale == 1 else None
        step = index_of(scheduler)
        step = place if step is None else step
        if step is None:
            step = index_of_value(scheduler, float(call.timesteps()[0]), tables)
            self._has_waited |= _is_remote(call.timestep)
        if not 0 <= step < len(tables):
            raise _not_at(scheduler, call)
        self._take(scheduler.timesteps, step)
        self.is_new = is_other or step < self.step
        self.is_repeat = not self.is_new and step == self.step
        if self.is_new:
            self.scheduler, self._timesteps, self._tables = scheduler, scheduler.timesteps, tables
            self.held, self.checks = {}, DeviceChecks()
            self._layouts, self._previous, self._copies = {}, None, []
        self.step = step
        if step != place:
            self._check_timestep(scheduler, call)

    def prediction(self, call: Call, like: Tensor) -> Prediction:
        """What the scheduler says of the call.

        Args:
            call: Of the denoiser.
            like: Tells the device and precision of levels that differ between pictures.
        """
        assert self.scheduler is not None
        steps = torch.tensor([self.tables.timestep(self.step)], dtype=torch.float64)
        if not hasattr(self.scheduler, "sigmas") and not _is_one_number(call.timestep):
            several = call.timesteps()
            steps = several if len(several) > 1 else steps
            self._has_waited |= _is_remote(call.timestep)
        return prediction_at(self.scheduler, self.step, steps, self.tables, like)

    def on_cpu(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the CPU, made once a run."""
        for known, copy in self._copies:
            if known is tensor:
                return copy
        self._has_waited |= _is_remote(tensor)
        self._copies = [*self._copies[-3:], (tensor, tensor.cpu())]
        return self._copies[-1][1]

    def read_checks(self) -> None:
        """Read what is to be checked, with one wait for the device a step.

        A step that has waited for it already leaves that to the next one, if there is one.
        """
        if self.is_last or not self._has_waited:
            self.checks.read()

    # What the batch holds, and what the calls of a step have in common

    def layout(self, denoiser: nn.Module, call: Call, caller: Caller | None) -> Layout:
        """The layout as the run's first batch of this size shows it.

        Args:
            denoiser: The module, compiled or not.
            call: Of the denoiser.
            caller: The pipeline that runs, if any.

        Raises:
            ValueError: The batch may hold several things.
        """
        batch = len(call.sample)
        if batch not in self._layouts:
            self._layouts[batch] = layout_by_samples(denoiser, call, caller, self.is_last)
            self._has_waited |= _is_remote(call.sample) and batch > 1
        return self._layouts[batch]

    def is_same_sample(self, call: Call) -> bool:
        """Whether the call before was at the same step with the same x_t."""
        if not self.is_repeat or self._previous is None:
            return False
        sample = self._previous[0]
        if _is_same_memory(sample, call.sample):
            return True
        self._has_waited |= _is_remote(sample)
        return sample.shape == call.sample.shape and torch.equal(sample, call.sample)

    def notice(self, call: Call, layout: Layout) -> None:
        """Compare a call with the one before, and with its layout.

        Args:
            call: Of the denoiser, guided.
            layout: What it is taken to hold.
        """
        if layout.has_halves:
            self.checks.refuse(~halves_agree(call.sample), lambda: _no_halves(layout))
        is_a_guess = layout.kind == "single" and not layout.is_told
        if is_a_guess and self.is_repeat and self._previous is not None:
            sample, condition = self._previous
            if _is_alike(sample, call.sample) and _is_alike(condition, call.condition):
                assert condition is not None and call.condition is not None
                again = (sample == call.sample).all() & (condition != call.condition).any()
                self.checks.refuse(again, _several_calls)
        self._previous = (call.sample, call.condition)

    # Terms that are held

    def hold(self, number: int, noise: Tensor | None, shape: torch.Size) -> None:
        """Hold the term of a weakened pass of the present step.

        Args:
            number: Of the guidance.
            noise: The term in units of the noise; `None` can't be held.
            shape: Of x_t.
        """
        before = self.held.get(number)
        # Schedulers that evaluate one timestep twice may not tell which time it is.
        is_again = before is not None and before.step == self.step
        is_again = is_again and self.tables.is_unique(self.step)
        passes = before.passes + 1 if before is not None and is_again else 1
        self.held[number] = Held(noise, shape, self.step, passes)

    def held_noise(
        self, number: int, every: int, shape: torch.Size, passes: int = 1
    ) -> Tensor | None:
        """The term that a step adds again, or `None` if it needs a weakened pass.

        Args:
            number: Of the guidance.
            every: From one weakened pass to the next, in timesteps.
            shape: Of x_t.
            passes: How many weakened passes a step of one picture may have.

        Raises:
            RuntimeError: Several samples are denoised in turn, so the term may be another's.
        """
        held = self.held.get(number)
        if held is None or held.noise is None or held.shape != shape:
            return None
        if not 0 < self.step - held.step < every:
            return None
        if held.passes > passes:
            raise RuntimeError(
                f"the denoiser is called {held.passes} times a step, so a term that is held may "
                "be another picture's; use every=1"
            )
        return held.noise

    def _take(self, timesteps: Tensor, step: int) -> None:
        """The run is this thread's.

        Raises:
            RuntimeError: It is another thread's.
        """
        thread = threading.current_thread()
        if thread is not self._owner:
            # A run that begins has other timesteps, or begins at an earlier one of the same.
            continued = min(self.step, self._interrupted.pop(thread, self.step))
            if timesteps is self._timesteps and step > continued:
                raise _two_threads()
            if self._owner is not None and self._tables is not None and not self.is_last:
                self._interrupted[self._owner] = self.step
        self._owner = thread

    def _check_timestep(self, scheduler: Scheduler, call: Call) -> None:
        """Refuse a scheduler that is elsewhere, and several timesteps where it has one level."""
        given = torch.as_tensor(call.timestep)
        values = given.flatten()
        expected = self.tables.timestep(self.step) * call.timestep_scale
        if hasattr(scheduler, "sigmas"):
            several = (values != values[0]).any()
            name = type(scheduler).__name__
            self.checks.refuse(several, lambda: _several_timesteps(name))
        # What networks receive may be rounded.
        if given.is_floating_point():
            allowed = 2 * torch.finfo(given.dtype).eps * abs(expected) + 1e-6
        else:
            allowed = 0.0 if expected == round(expected) else 1.0
        is_elsewhere = (values[0] - expected).abs() > allowed
        self.checks.refuse(is_elsewhere, lambda: _not_at(scheduler, call))


def _scheduler_of(call: Call, caller: Caller | None, given: Scheduler | None) -> Scheduler:
    """The scheduler that is at the call's timestep."""
    if given is not None:
        return given
    if caller is None or not caller.schedulers:
        raise RuntimeError(
            "no pipeline is running, so the scheduler and the batch layout are unknown; to call "
            "the denoiser in a loop of your own, attach to it with scheduler= and batch_layout="
        )
    if len(caller.schedulers) == 1:
        return caller.schedulers[0]
    timestep = float(call.timesteps()[0])
    for scheduler in caller.schedulers:
        if getattr(scheduler, "num_inference_steps", None) is not None and is_at(
            scheduler, timestep
        ):
            return scheduler
    raise _not_at(caller.schedulers[0], call)


def is_at(scheduler: Any, timestep: float) -> bool:
    """Whether a scheduler's state is that of a step at a timestep.

    Args:
        scheduler: A diffusers scheduler.
        timestep: As it counts.
    """
    if getattr(scheduler, "timesteps", None) is None:
        return False
    tables = Tables(scheduler)
    index = getattr(scheduler, "step_index", None)
    index = index_of_value(scheduler, timestep, tables) if index is None else int(index)
    return 0 <= index < len(tables) and abs(tables.timestep(index) - timestep) < 1


def _is_one_number(timestep: Any) -> bool:
    return not isinstance(timestep, Tensor) or not any(timestep.flatten().stride())


def _is_remote(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.stride() == b.stride()
        and a.data_ptr() == b.data_ptr()
    )


def _is_alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.device == b.device


def _two_threads() -> RuntimeError:
    return RuntimeError(
        "two threads call one guided denoiser: let them wait for each other, or give each a "
        "pipeline with a denoiser of its own"
    )


def _not_at(scheduler: Scheduler, call: Call) -> ValueError:
    timestep = float(call.timesteps()[0])
    return ValueError(
        f"{type(scheduler).__name__} is not at timestep {timestep:g}, with which the denoiser is "
        "called, so the noise level is unknown: give guidance the scheduler that runs, by "
        "attaching to its pipeline, or to the denoiser with scheduler="
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
