"""Settings of samples, and the class of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_count, check_finite
from ..pipelines.adm import ADMPipeline


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings that all samples of a run share, checked when made.

    Attributes:
        num_inference_steps: Sampling steps, at least 1.
        classes: Sample i is of the class `classes[i % len(classes)]`. Without any, models that
            need a class draw each sample's with its seed, and models that know a label for "no
            class" draw without.
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
        """Checks every setting."""
        check_count("num_inference_steps", self.num_inference_steps)
        classes: Any = self.classes
        if not isinstance(classes, Sequence) or isinstance(classes, str):
            raise ValueError(f"classes={self.classes!r:.60} must be a sequence of whole numbers")
        for label in self.classes:
            check_count("classes", label, least=0)
        for name in ("sag_scale", "classifier_scale"):
            if getattr(self, name) is not None:
                check_finite(name, getattr(self, name))
        if check_finite("eta", self.eta) < 0:
            raise ValueError(f"eta={self.eta} must be at least 0")


def choose_labels(
    pipeline: ADMPipeline, settings: SampleSettings, seeds: Sequence[int]
) -> list[int] | None:
    """Chooses a class for each sample.

    Args:
        pipeline: The model.
        settings: Its `classes` are given out in turn. Without any, a class is drawn with the seed
            of each sample, if the model needs one or if a classifier guides.
        seeds: One a sample.

    Returns:
        A class for each sample, or `None` if none has one.

    Raises:
        ValueError: The settings do not fit the model.
    """
    classifier: Any = pipeline.classifier
    if settings.classifier_scale and classifier is None:
        raise ValueError(
            f"classifier_scale={settings.classifier_scale} must be 0: there is no classifier"
        )
    guided = classifier is not None and settings.classifier_scale != 0
    of_model: int | None = pipeline.unet.config.get("num_class_embeds")
    of_classifier = getattr(getattr(classifier, "config", None), "num_classes", None)
    known = [count for count in (of_model, of_classifier if guided else None) if count is not None]
    if settings.classes:
        if of_model is None and not guided:
            raise ValueError(
                f"classes={list(settings.classes)} must not be given: the model knows no classes"
            )
        return _in_turn(settings.classes, known, len(seeds))
    null_label: int | None = pipeline.config["null_label"]
    if not guided and (of_model is None or null_label is not None):
        return None
    if not known:
        raise ValueError("classes=() must be given: the classifier does not tell how many it knows")
    choices = [label for label in range(min(known)) if label != null_label]
    return [choices[int(np.random.default_rng(seed).integers(len(choices)))] for seed in seeds]


def _in_turn(classes: Sequence[int], known: Sequence[int], samples: int) -> list[int]:
    for label in classes:
        if known and label >= min(known):
            raise ValueError(f"classes={label} must be from 0 to {min(known) - 1}")
    return [classes[number % len(classes)] for number in range(samples)]
