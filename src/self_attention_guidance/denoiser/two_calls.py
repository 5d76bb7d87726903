"""Classifier-free guidance whose two predictions are separate calls.

Guidance adds the same terms to both predictions of a step. When a term comes from the second call,
the first one's prediction is in the hands of the pipeline by then: the terms are added to it in
place, before the pipeline combines the two.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from .layout import Layout


class TwoCalls:
    """The calls of one step, and what they owe each other.

    Attributes:
        is_second: Whether the present call is the second of its step.
    """

    def __init__(self) -> None:
        """No call yet."""
        self.is_second = False
        self._first_terms: dict[int, Tensor] = {}
        self._expects_second = False
        self._owes_guidance = False
        self._first: Any = None
        self._first_plain: Any = None

    def begin(self, is_new_run: bool, has_same_sample: bool, cfg: bool | None) -> None:
        """Note a call that is about to run.

        Args:
            is_new_run: Whether it is the first one of its run.
            has_same_sample: Whether the call before was at the same step with the same x_t.
            cfg: Whether the pipeline says that a second call follows a first one; `None` learns
                it from the steps before.

        Raises:
            RuntimeError: The step before was to be guided by a second call, which did not come.
        """
        self.is_second = has_same_sample and not self.is_second and self._first is not None
        if is_new_run:
            self._expects_second = self._owes_guidance = self.is_second = False
        elif self.is_second:
            self._expects_second = True
        elif self._owes_guidance:
            self._owes_guidance = False
            raise RuntimeError(
                "a step ran without its second call, and so without guidance; use branch='cond', "
                "or the branch that is called first"
            )
        if cfg is not None:
            self._expects_second = cfg
        if not self.is_second:
            self._first_terms = {}

    def needs_term(self, layout: Layout, branch: str) -> bool:
        """Whether the present call makes the term of a guided branch."""
        if not layout.has_two_calls:
            return True
        if layout.is_of_first_call(branch):
            return not self.is_second
        return self.is_second or not self._expects_second

    def finish(
        self, prediction: Tensor, terms: dict[int, Tensor], are_all: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What a call returns, and the terms in it.

        Args:
            prediction: Of the network.
            terms: What guidance adds to it, by the number of the guidance; of the second call,
                those that it made itself.
            are_all: Whether no further term comes from the second call.

        Returns:
            The guided prediction, or one that the second call will guide.

        Raises:
            RuntimeError: The first prediction is out of reach, so it can't be guided.
        """
        if not self.is_second:
            guided = _added(prediction, terms) if terms else prediction.clone()
            self._first, self._first_plain = weakref.ref(guided), prediction
            self._first_terms, self._owes_guidance = terms, not are_all
            return guided, terms
        whole = {**self._first_terms, **terms}
        if terms:
            first = self._first()
            if first is None:
                raise RuntimeError(
                    "the first call's prediction was copied before the second call, so it can't "
                    "be guided; use branch='cond', or the branch that is called first"
                )
            first.copy_(_added(self._first_plain, whole))
        self._owes_guidance = False
        return _added(prediction, whole), whole


def _added(prediction: Tensor, terms: dict[int, Tensor]) -> Tensor:
    return (prediction + total(terms)).to(prediction.dtype)


def total(terms: dict[int, Tensor]) -> Tensor:
    """The sum of the terms of several guidances, whose order does not matter."""
    return functools.reduce(torch.add, (terms[number] for number in sorted(terms)))
