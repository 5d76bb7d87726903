"""What the batch of a call holds: pictures, or the halves of classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .call import Call
from .caller import Caller
from .families import BatchLayout, config_of


@dataclass(frozen=True)
class Layout:
    """What a call holds, and whether the pipeline or the user said so, instead of the samples."""

    kind: BatchLayout
    is_told: bool

    @property
    def has_halves(self) -> bool:
        """Whether the batch holds every picture twice."""
        return self.kind in ("uncond_first", "cond_first")

    @property
    def has_two_calls(self) -> bool:
        """Whether a step may be two calls."""
        return self.kind in ("uncond_call_first", "cond_call_first")

    def rows(self, batch: int, branch: str) -> slice:
        """The rows of a batch that are of a branch, "uncond" or "cond"."""
        if not self.has_halves:
            return slice(0, batch)
        if batch % 2:
            raise ValueError(
                f"a batch of {batch} can't hold a conditional and an unconditional half "
                f"(batch_layout={self.kind!r})"
            )
        is_first = self.kind == f"{branch}_first"
        return slice(0, batch // 2) if is_first else slice(batch // 2, batch)


def layout_of(call: Call, caller: Caller | None, given: BatchLayout | None) -> Layout | None:
    """The layout that the user, a pipeline or the denoiser's family tells; `None` if none does."""
    if given is not None:
        return Layout(given, True)
    if call.arguments.get("skip_layers") is not None:
        raise ValueError(
            "skip-layer guidance is on, and its call is not supported; leave out "
            "skip_guidance_layers"
        )
    usual = Layout(call.family.cfg_layout, True)
    if usual.has_two_calls or (usual.kind == "single" and caller is not None):
        return usual
    cfg = None if caller is None else caller.cfg
    if cfg is None:
        return None
    return usual if cfg else Layout("single", True)


def layout_by_samples(
    denoiser: nn.Module, call: Call, caller: Caller | None, is_last_step: bool
) -> Layout:
    """The layout as the samples and conditions of a run's first guided step show it.

    Refuses a batch that may hold several things. At a run's last step, no later one can show that
    pictures of one seed were taken for halves.
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
    name = type(denoiser if caller is None else caller.pipeline).__name__
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
