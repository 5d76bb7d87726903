"""The class of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..generate.sample_settings import SampleSettings
from ..pipelines.adm import ADMPipeline


def choose_labels(
    pipeline: ADMPipeline, settings: SampleSettings, seeds: Sequence[int]
) -> list[int] | None:
    """Choose a class for each sample.

    Args:
        pipeline: The model.
        settings: Samples take its `classes` in turn. Without any, each sample's class is drawn with
            its seed, if the model needs classes or a classifier guides.
        seeds: One for each sample.

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
                f"classes={list(settings.classes)} must not be given: the model has no classes"
            )
        return _in_turn(settings.classes, known, len(seeds))
    null_label: int | None = pipeline.config["null_label"]
    if not guided and (of_model is None or null_label is not None):
        return None
    if not known:
        raise ValueError("classes=() must be given: the classifier does not say how many it has")
    choices = [label for label in range(min(known)) if label != null_label]
    return [choices[int(np.random.default_rng(seed).integers(len(choices)))] for seed in seeds]


def _in_turn(classes: Sequence[int], known: Sequence[int], samples: int) -> list[int]:
    for label in classes:
        if known and label >= min(known):
            raise ValueError(f"classes={label} must be from 0 to {min(known) - 1}")
    return [classes[number % len(classes)] for number in range(samples)]
