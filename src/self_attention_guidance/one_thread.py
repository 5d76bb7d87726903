"""A guided denoiser serves one thread at a time: two would read each other's attention."""

from __future__ import annotations

import threading
from typing import Any


class OneThread:
    """Whose run it is.

    A run belongs to the thread of its first call. Another thread may begin one when it is over,
    and a run that it begins earlier ends the first: that one's next call is refused.
    """

    def __init__(self, is_for_this_thread: bool) -> None:
        """Nothing runs yet.

        Args:
            is_for_this_thread: Whether all runs are of the thread that makes this.
        """
        self._is_fixed = is_for_this_thread
        self._owner = threading.get_ident() if is_for_this_thread else None
        self._run: Any = None
        self._step = 0
        self._interrupted: dict[int, int] = {}
        self._busy = threading.Lock()
        self._inside: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there are other threads."""
        return OneThread, (False,)

    def enter(self) -> None:
        """A call of the denoiser begins.

        Raises:
            RuntimeError: It is another thread's.
        """
        if self._is_fixed and not self._is_owner():
            raise self._refusal()
        # After Ctrl-C, an earlier call of the same thread may never have ended.
        if not self.is_inside() and not self._busy.acquire(blocking=False):
            raise self._refusal()
        self._inside = threading.get_ident()

    def at(self, run: Any, step: int) -> None:
        """The call is at a step.

        Args:
            run: The scheduler's timesteps, which are others for every run.
            step: Index of the present step among them.

        Raises:
            RuntimeError: It continues another thread's run.
        """
        thread = threading.get_ident()
        if thread != self._owner:
            # A run that begins has other timesteps, or begins at an earlier one of the same.
            continued = min(self._step, self._interrupted.pop(thread, self._step))
            if run is self._run and step > continued:
                raise self._refusal()
            if self._owner is not None and self._step < len(self._run) - 1:
                self._interrupted[self._owner] = self._step
        self._owner, self._run, self._step = thread, run, step

    def is_inside(self) -> bool:
        """Whether a call of this thread has begun and not ended."""
        return self._inside == threading.get_ident()

    def leave(self) -> None:
        """The call that this thread began ends."""
        self._inside = None
        self._busy.release()

    def _is_owner(self) -> bool:
        return self._owner == threading.get_ident()

    def _refusal(self) -> RuntimeError:
        return RuntimeError(
            "two threads call one guided denoiser: let them wait for each other, or give each a "
            "pipeline with a denoiser of its own"
        )
