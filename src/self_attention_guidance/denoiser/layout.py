"""What the batch of a call holds: pictures, or the halves of classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .call import Call
from .caller import Caller
from .families import TWO_CALLS, BatchLayout
from .protocols import config_of


@dataclass(frozen=True)
class Layout:
    """What a call holds.

    Attributes:
        kind: As in `BatchLayout`.
        is_told: Whether the pipeline or the user said so, instead of the samples.
    """

    kind: BatchLayout
    is_told: bool

    @property
    def has_halves(self) -> bool:
        """Whether the batch holds every picture twice."""
        return self.kind in ("uncond_first", "cond_first")

    @property
    def has_two_calls(self) -> bool:
        """Whether a step may be two calls."""
        return self.kind in TWO_CALLS

    def rows(self, batch: int, branch: str) -> slice:
        """The rows of a batch whose attention and weakened pass are used.

        Args:
            batch: Rows of the batch.
            branch: "uncond" or "cond".

        Raises:
            ValueError: The batch has no two halves.
        """
        if not self.has_halves:
            return slice(0, batch)
        if batch % 2:
            raise ValueError(
                f"a batch of {batch} can't hold a conditional and an unconditional half "
                f"(batch_layout={self.kind!r})"
            )
        is_first = self.kind == f"{branch}_first"
        return slice(0, batch // 2) if is_first else slice(batch // 2, batch)

    def is_of_first_call(self, branch: str) -> bool:
        """Whether the first of two calls predicts a branch."""
        return self.kind == f"{branch}_call_first"


def layout_of(call: Call, caller: Caller | None, given: BatchLayout | None) -> Layout | None:
    """The layout that a pipeline, the user, or the denoiser itself tells.

    Args:
        call: Of the denoiser.
        caller: The pipeline that runs, if any.
        given: What the user said, if anything.

    Returns:
        The layout; `None` if only the samples tell.
    """
    if given is not None:
        return Layout(given, True)
    _refuse_other_guidance(call)
    family = call.family
    if family.cfg_layout in TWO_CALLS or (family.cfg_layout == "single" and caller is not None):
        return Layout(family.cfg_layout, True)
    cfg = None if caller is None else caller.cfg
    if cfg is None:
        return None
    return Layout(family.cfg_layout if cfg else "single", True)


def layout_by_samples(
    denoiser: nn.Module, call: Call, caller: Caller | None, is_last_step: bool
) -> Layout:
    """The layout as the samples and conditions of a run's first guided step show it.

    Args:
        denoiser: The module, compiled or not.
        call: Of the denoiser.
        caller: The pipeline that runs; `None` in a loop of one's own.
        is_last_step: Whether no later step can show that pictures of one seed were taken for
            halves.

    Raises:
        ValueError: The batch may hold several things; says how to tell.
    """
    family, condition = call.family, call.condition
    if len(call.sample) < 2 or condition is None or len(condition) != len(call.sample):
        return Layout("single", False)
    repeats = _repeats(call.sample, condition)
    if not repeats.any():
        return Layout("single", False)
    batch = len(repeats)
    has_halves = batch % 2 == 0 and bool(repeats.diagonal(batch // 2).all())
    if has_halves and family.null_label is not None:
        return Layout(_layout_by_labels(denoiser, call), True)
    has_one_twin_each = int(repeats.sum()) == batch
    if has_halves and has_one_twin_each and caller is not None and not is_last_step:
        return Layout(family.cfg_layout, False)
    name = type(denoiser).__name__ if caller is None else caller.name
    raise ValueError(
        f"{name} does not tell what its batch holds: samples repeat with several conditions, as "
        "pictures of one seed do, and as classifier-free guidance does; attach with batch_layout="
        "'single', 'uncond_first' or 'cond_first'"
    )


def halves_agree(rows: Tensor) -> Tensor:
    """Whether both halves of an even number of rows are the same, bool on their device."""
    first, second = rows.chunk(2)
    return ((first == second) | (first.isnan() & second.isnan())).all()


def _repeats(sample: Tensor, condition: Tensor) -> Tensor:
    """Which rows hold one sample with two conditions, bool, (batch, batch), on the CPU."""
    same, alike = (
        (rows[:, None] == rows[None]).flatten(2).all(dim=2)
        for rows in (sample, condition.flatten(1) if condition.ndim > 1 else condition[:, None])
    )
    return (same & ~alike).cpu()


def _layout_by_labels(denoiser: nn.Module, call: Call) -> BatchLayout:
    """Two halves of the same samples, one of them without a class, are those of CFG."""
    labels: Any = call.condition
    null = labels == config_of(denoiser).get(str(call.family.null_label))
    first, second = (half.tolist() for half in null.cpu().chunk(2))
    if all(second) and not any(first):
        return "cond_first"
    return "uncond_first" if all(first) and not any(second) else "single"


def _refuse_other_guidance(call: Call) -> None:
    """Refuse guidance of the pipeline that makes calls which are not those of CFG."""
    if call.arguments.get("skip_layers") is not None:
        raise ValueError(
            "skip-layer guidance is on, and its call is not supported; leave out "
            "skip_guidance_layers"
        )
