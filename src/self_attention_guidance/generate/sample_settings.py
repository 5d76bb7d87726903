"""The settings that all samples of a run share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import as_python, check_count, check_finite, keep_python_numbers


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings that all samples of a run share, checked when made.

    Attributes:
        num_inference_steps: Sampling steps, at least 1.
        classes: Sample i is of the class `classes[i % len(classes)]`. Without any, models that
            need a class choose each sample's with its seed, and models with a label for "no class"
            draw without.
        sag_scale: Scale of `pipeline.guidance`; `None` is its own.
        classifier_scale: Scale of classifier guidance; `None` is 1 with a classifier.
        eta: Share of fresh noise in DDIM, at least 0.

    Raises:
        ValueError: A setting is outside its range.
    """

    num_inference_steps: int = 250
    classes: Sequence[int] = ()
    sag_scale: float | None = None
    classifier_scale: float | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        """Check every setting."""
        keep_python_numbers(self)
        check_count("num_inference_steps", self.num_inference_steps)
        classes: Any = self.classes
        if not isinstance(classes, Iterable) or isinstance(classes, str):
            raise ValueError(f"classes={self.classes!r:.60} must be a sequence of whole numbers")
        object.__setattr__(self, "classes", tuple(map(as_python, classes)))
        for label in self.classes:
            check_count("classes", label, least=0)
        for name in ("sag_scale", "classifier_scale"):
            if getattr(self, name) is not None:
                check_finite(name, getattr(self, name))
        if check_finite("eta", self.eta) < 0:
            raise ValueError(f"eta={self.eta} must be at least 0")
