"""At which steps of a run a guidance acts."""

from __future__ import annotations

import warnings

from ..denoiser.run import Run
from .base import Guidance


def acts(guidance: Guidance, run: Run, step: int) -> bool:
    """Whether a guidance acts at a step of a run.

    Args:
        guidance: With its window of steps, and of noise levels.
        run: The run.
        step: Number of the step, from 0.
    """
    noise = run.schedule.noise(step) if guidance.has_noise_window else None
    return guidance.acts_at(step, len(run.schedule), noise)


def check_window(guidance: Guidance, run: Run) -> None:
    """Refuse a window of noise levels without a step in the rest of the run.

    An empty window of fractions is only a warning: a run may be divided between pipelines, only one
    of which is guided.

    Args:
        guidance: With its window.
        run: The run; its steps from the present one on count.

    Raises:
        ValueError: No step has a noise level in the window.
    """
    steps = range(run.step, len(run.schedule))
    if guidance.scale == 0 or any(acts(guidance, run, step) for step in steps):
        return
    if guidance.has_noise_window:
        levels = [run.schedule.noise(step) for step in steps]
        raise ValueError(
            f"no step is guided by {guidance}: the noise of this run's {len(levels)} steps goes "
            f"from {max(levels):.4g} down to {min(levels):.4g}; change noise_from and noise_to, or "
            "start and stop, or take more steps"
        )
    first = run.step / len(run.schedule)
    message = (
        f"no step is guided by {guidance}: this run has {len(steps)} steps, from {first:.3g} of the"
        " way to its end; change start and stop, or take more steps"
    )
    # Python shows a warning of the same line and text once only; each such run has one.
    warnings.warn_explicit(message, UserWarning, __file__, 1, module=__name__, registry={})
