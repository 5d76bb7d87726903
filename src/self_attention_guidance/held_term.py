"""The guidance term between second passes: the steps after one may add its term again.

The term changes slowly from step to step, so that a second pass at every n-th guided step keeps
most of what guidance gains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeldTerm:
    """The term of the last second pass, and which steps may add it again."""

    def __init__(self, every: int) -> None:
        """Nothing is held yet.

        Args:
            every: From one second pass to the next, in timesteps of the scheduler, at least 1.
        """
        self._term: Tensor | None = None
        self._every = every
        self._run: Any = None
        self._step = 0
        self._shape: torch.Size | None = None
        self._passes = 0

    def hold(self, term: Tensor, sample: Tensor, run: Tensor, step: int) -> None:
        """Hold the term of a second pass.

        Args:
            term: What guidance adds to each image's rows of the denoiser's output.
            sample: x_t of the guided rows.
            run: The scheduler's timesteps, which are others for every run.
            step: Index of the present step among them.
        """
        is_again = run is self._run and step == self._step
        # Schedulers that evaluate one timestep twice may not tell which time it is.
        is_again = is_again and bool((run == run[step]).sum() == 1)
        self._passes = self._passes + 1 if is_again else 1
        self._term, self._shape, self._run, self._step = term, sample.shape, run, step

    def at(self, sample: Tensor, run: Tensor, step: int, passes: int = 1) -> Tensor | None:
        """The term that a step adds again, or `None` if it needs a second pass.

        A step that does not lie behind the last second pass belongs to another picture.

        Args:
            sample: As in `hold`.
            run: As in `hold`.
            step: As in `hold`.
            passes: How many second passes a step of one picture may have.

        Raises:
            RuntimeError: Several samples are denoised in turn, so the term may be another's.
        """
        is_held = run is self._run and 0 < step - self._step < self._every
        if not is_held or sample.shape != self._shape:
            return None
        if self._passes > passes:
            raise RuntimeError(
                f"the denoiser is called {self._passes} times a step, so a term that is held may "
                "be another picture's; use every=1"
            )
        self._passes = 0
        return self._term
