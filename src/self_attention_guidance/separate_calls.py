"""Classifier-free guidance whose two predictions are separate calls, the conditional one first.

Guidance adds one term to both predictions of a step, that of the guided branch. When this is the
second call, the first one's prediction is in the hands of the pipeline by then: the term is added
to it in place, before the pipeline combines the two.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class SeparateCalls:
    """The calls of one step, and what they owe each other."""

    def __init__(self, branch: str) -> None:
        """Guide `branch`, "uncond" or "cond"."""
        self._branch = branch
        self._run: Any = None
        self._moment: Any = None
        self._sample: Tensor | None = None
        self._is_second = False
        self._expects_second = False
        self._owes_guidance = False
        self._first: Any = None
        self._first_plain: Any = None
        self._first_term: Any = None

    def begin(
        self, scheduler: Any, timestep: Any, sample: Tensor, is_told: bool | None = None
    ) -> bool:
        """Note a call that is about to run.

        Args:
            scheduler: Its present state tells steps and runs apart.
            timestep: Of the call.
            sample: x_t of the call.
            is_told: Whether a second call is said to follow a first one; `None` learns it from
                the steps before.

        Returns:
            Whether the call's own guidance term is needed.

        Raises:
            RuntimeError: The step before was to be guided by a second call, which did not come.
        """
        moment = (getattr(scheduler, "step_index", None), torch.as_tensor(timestep).flatten()[0])
        is_new_run = scheduler.timesteps is not self._run
        is_second = False
        if not (is_new_run or self._is_second or self._sample is None):
            is_second = moment == self._moment and torch.equal(sample, self._sample)
        self._is_second = is_second
        if is_new_run:
            self._expects_second = self._owes_guidance = False
        elif self._is_second:
            self._expects_second = True
        elif self._owes_guidance:
            raise RuntimeError(
                "a step ran without its unconditional call, and so without guidance; use "
                "branch='cond'"
            )
        if is_told is not None:
            self._expects_second = is_told
        self._run, self._moment, self._sample = scheduler.timesteps, moment, sample
        if self._branch == "cond":
            return not self._is_second
        return self._is_second or not self._expects_second

    def finish(self, prediction: Tensor, term: Tensor | None) -> Tensor:
        """What a call returns.

        Args:
            prediction: Of the network.
            term: What guidance adds to it, same shape; `None` if `begin` did not ask for it.

        Returns:
            The guided prediction, or one that the second call will guide.

        Raises:
            RuntimeError: The first prediction is out of reach, so it can't be guided.
        """
        if not self._is_second:
            guided = prediction.clone() if term is None else _added(prediction, term)
            self._first, self._owes_guidance = weakref.ref(guided), term is None
            self._first_plain, self._first_term = prediction, term
            return guided
        if term is None:  # the first call's own term is due
            return _added(prediction, self._first_term)
        first = self._first()
        if first is None:
            raise RuntimeError(
                "the conditional prediction was copied before the unconditional call, so it "
                "can't be guided; use branch='cond'"
            )
        first.copy_(_added(self._first_plain, term))
        self._owes_guidance = False
        return _added(prediction, term)


def _added(prediction: Tensor, term: Tensor) -> Tensor:
    return (prediction + term).to(prediction.dtype)
