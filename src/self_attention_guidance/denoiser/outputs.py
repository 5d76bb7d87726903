"""Outputs of the denoiser: their pictures, and the guidance terms that are added to them."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..checks import GuidanceError

if TYPE_CHECKING:
    from .call import Layout


def stacked(pictures: Any) -> Tensor:
    """Stack pictures to (batch, channels, height, width); in lists, each has an axis of one frame.

    Raises:
        ValueError: They differ in size, or hold several frames or pictures each.
    """
    if isinstance(pictures, Tensor):
        return pictures
    found = cast("list[Tensor]", pictures)
    shapes = {tuple(each.shape) if isinstance(each, Tensor) else () for each in found}  # pyright: ignore[reportUnnecessaryIsInstance]
    shape = min(shapes)
    if len(shapes) > 1 or len(shape) != 4 or shape[1] != 1:
        raise ValueError("pictures of several sizes, frames or parts in one call are not supported")
    return torch.stack(found).squeeze(2)


def as_given(pictures: Tensor, given: Any) -> Tensor | list[Tensor]:
    """Turn pictures in one tensor back into a list if `given` is one; reverses `stacked`."""
    return pictures if isinstance(given, Tensor) else list(pictures.unsqueeze(2).unbind())


def precise(tensor: Tensor) -> Tensor:
    """Convert a tensor to float32, unless it is more precise already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def total(terms: dict[int, Tensor]) -> Tensor:
    """Add the terms of several guidances; their order does not matter."""
    return functools.reduce(torch.add, (terms[number] for number in sorted(terms)))


def added(output: Tensor, terms: dict[int, Tensor]) -> Tensor:
    """Add the terms of the guided rows to all rows of a denoiser's output."""
    term = total(terms)
    # Not a view, so that slices that a pipeline takes keep this tensor alive (see `TwoCalls`).
    everywhere = torch.cat([term] * (len(output) // len(term)))
    return (precise(output) + everywhere).to(output.dtype)


def with_first(output: Any, pictures: Tensor) -> Any:
    """Replace the pictures in the first entry of a tuple or model output."""
    first = as_given(pictures, output[0])
    if isinstance(output, tuple):
        return (first, *cast("tuple[Any, ...]", output)[1:])
    return dataclasses.replace(output, **{next(iter(output.keys())): first})


_USE_FIRST = "so it is not guided; use branch='cond', or the branch that is called first"


class TwoCalls:
    """The two calls of a step, one for each prediction of classifier-free guidance.

    Guidance adds the same terms to both predictions. If a term comes from the second call, the
    pipeline already has the first prediction, so the terms are added to it in place.
    """

    def __init__(self) -> None:
        self._is_second = self._expects_second = self._owes_guidance = False
        self._wanted = 0
        self._first: Any = None
        self._first_plain: Any = None
        self._first_terms: dict[int, Tensor] = {}

    def begin(self, has_same_sample: bool, cfg: bool | None, wanted: int, is_last: bool) -> None:
        """Register a call that is about to run; `wanted` is the number of terms of its step.

        `cfg` is whether a second call follows the first; with `None`, earlier steps decide. At the
        run's last step no later call could show that they were wrong, so none is expected.
        """
        if has_same_sample and self._is_second and cfg is None:
            raise GuidanceError(
                "the denoiser is called a third time at one step with the same sample: at most two "
                "conditions a picture are supported; several pictures of one seed fit in a batch"
            )
        self._is_second = has_same_sample and not self._is_second and self._first is not None
        if self._is_second:
            self._expects_second = True
        elif self._owes_guidance:
            self._owes_guidance = False
            raise GuidanceError(f"a step ran without its second call, {_USE_FIRST}")
        self._wanted = wanted
        if cfg is not None or is_last:
            self._expects_second = bool(cfg)
        if not self._is_second:
            self._first_terms = {}

    @property
    def owes_guidance(self) -> bool:
        """Whether the first prediction still lacks a term, which the second call computes."""
        return self._owes_guidance

    def needs_term(self, layout: Layout, branch: str) -> bool:
        """Whether the present call computes the term of a guided branch."""
        if not layout.has_two_calls:
            return True
        if layout.kind == f"{branch}_call_first":
            return not self._is_second
        return self._is_second or not self._expects_second

    def finish(
        self, prediction: Tensor, terms: dict[int, Tensor]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the guided output of a call, and all terms in it, those of the first call too."""
        if not self._is_second:
            guided = added(prediction, terms) if terms else prediction.clone()
            self._first, self._first_plain = weakref.ref(guided), prediction
            self._first_terms, self._owes_guidance = terms, len(terms) < self._wanted
            return guided, terms
        whole = {**self._first_terms, **terms}
        if terms:
            first = self._first()
            if first is None:
                # In this mode, views do not keep what they are of alive.
                cut = ", or cut under torch.inference_mode() instead of torch.no_grad()"
                was = f"copied{cut if prediction.is_inference() else ''}"
                raise GuidanceError(f"the first call's prediction was {was}, {_USE_FIRST}")
            first.copy_(added(self._first_plain, whole))
        self._owes_guidance = False
        return added(prediction, whole), whole
