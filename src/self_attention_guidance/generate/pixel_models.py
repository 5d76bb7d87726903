"""Pixel-space models by name, folder or hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..models.builtin import (
    RecommendedSettings,
    builtin_folder,
    builtin_names,
    recommended_settings,
)
from ..models.versions import dtype_argument
from ..pipelines.adm import ADMPipeline
from .kinds import PIXEL_CLASSES, is_stable_diffusion
from .loaded import Loaded
from .models import find_device, find_dtype, find_folder, loading_failed
from .sample_settings import SampleSettings
from .schedulers import make_pixel_scheduler
from .weights import refuse_missing_weights


@dataclass(frozen=True, kw_only=True)
class LoadedPixelModel(Loaded[SampleSettings]):
    """A pipeline with what its folder says about it.

    Attributes:
        name: Short name of the model, for metadata.
        pipeline: On its device; `pipeline.guidance` holds the recommended settings, if there are
            any.
        recommended: What the model recommends for itself; empty if it says nothing.
    """

    name: str
    pipeline: ADMPipeline
    recommended: RecommendedSettings
    settings_class = SampleSettings

    def make_scheduler(self, name: str) -> Any:
        """A scheduler for this model.

        Args:
            name: One of `scheduler_names()`.

        Raises:
            ValueError: It does not suit the model.
        """
        config: Any = self.pipeline.unet.config
        learned = config.out_channels == 2 * config.in_channels
        return make_pixel_scheduler(name, self.pipeline.scheduler.config, learned_variance=learned)


def load_pixel_model(
    model: str = "emoji-adm",
    device: str = "auto",
    dtype: str = "auto",
    classifier: str | Path | None = None,
) -> LoadedPixelModel:
    """Loads a pixel-space model for guided sampling.

    Weights are read from safetensors files only, so that no code in a checkpoint is ever run.

    Args:
        model: Name of a builtin model, the folder of an `ADMPipeline`, `DDPMPipeline` or
            `DDIMPipeline`, or the id of a repository on the Hugging Face hub ("owner/name").
        device: As in `find_device`.
        dtype: As in `find_dtype`; but "auto" is float32 for models that compute in float16 by
            themselves, as ADM's converted checkpoints do.
        classifier: Folder of a `NoisyClassifier`; `None` keeps the model's own, if it has one.

    Returns:
        The pipeline on its device and its recommended settings.

    Raises:
        ValueError: The model is missing or cannot be loaded, or the device or dtype is unknown.
    """
    target = find_device(device)
    wanted = find_dtype(dtype, target)
    source = find_pixel_model(model)
    pipeline = _load_pipeline(model, source)
    if os.path.isdir(source):  # what comes from the hub is checked by its checksums
        refuse_missing_weights(model, pipeline, source)
    if classifier is not None:
        size = pipeline.unet.config.sample_size
        pipeline.register_modules(classifier=_load_classifier(classifier, size))
    if dtype == "auto" and pipeline.unet.config.get("use_fp16"):
        wanted = torch.float32
    recommended = recommended_settings(source)
    if recommended.guidance:
        pipeline.guidance = recommended.make_guidance()
    return LoadedPixelModel(
        name=Path(source).name, pipeline=pipeline.to(target, wanted), recommended=recommended
    )


def find_pixel_model(model: str) -> str:
    """Says what a pixel-space model's name stands for, without loading it.

    Args:
        model: As in `load_pixel_model`.

    Returns:
        A folder or a hub id.

    Raises:
        ValueError: It is neither, or nothing that can be loaded.
    """
    if model not in builtin_names() and Path(model).expanduser().is_file():
        raise ValueError(
            f"model={model!r} is a file: give a folder; `sag convert` makes one of an original"
            " checkpoint"
        )
    return find_folder(model, _check_index)


def is_pixel_model(model: str) -> bool:
    """Whether a name stands for a folder that is known to hold a pixel-space model.

    Args:
        model: As in `load_pixel_model`, or in `load_pipeline`. Of hub ids nothing is known.
    """
    folder = builtin_folder(model) if model in builtin_names() else Path(model).expanduser()
    try:
        index: object = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and cast("Any", index).get("_class_name") in PIXEL_CLASSES


def find_classifier(folder: str | Path) -> Path:
    """Checks the folder of a classifier, without loading it.

    Args:
        folder: What `save_pretrained` of a `NoisyClassifier` wrote.

    Returns:
        The folder.

    Raises:
        ValueError: It is no such folder.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"classifier={str(folder)!r} must be a folder that `sag convert classifier` wrote"
        )
    return path


def _load_pipeline(model: str, source: str) -> Any:
    local = os.path.isdir(source)
    try:
        index: Any = {} if local else ADMPipeline.load_config(source)
    except Exception as error:  # the libraries raise every kind for what they cannot read
        raise ValueError(loading_failed(model, source, error)) from error
    if not local:  # a folder's index was checked when it was found
        _check_index(model, index)
    try:
        return ADMPipeline.from_pretrained(
            source, use_safetensors=True, local_files_only=local, **dtype_argument(torch.float32)
        )
    except Exception as error:
        raise ValueError(loading_failed(model, source, error)) from error


def _load_classifier(folder: str | Path, size: int) -> Any:
    from ..models.originals import NoisyClassifier

    path = find_classifier(folder)
    try:
        classifier: Any = NoisyClassifier.from_pretrained(
            str(path), use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # the libraries raise every kind for files that they cannot read
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"classifier={str(folder)!r} cannot be loaded: {told}") from error
    if classifier.config.sample_size != size:
        raise ValueError(
            f"classifier={str(folder)!r} is for pictures of {classifier.config.sample_size} pixels,"
            f" the model draws {size}"
        )
    return classifier.eval()


def _check_index(model: str, index: Mapping[str, Any], _: Path | None = None) -> None:
    class_name = index.get("_class_name")
    if class_name in PIXEL_CLASSES:
        return
    if is_stable_diffusion(index):
        raise ValueError(
            f"model={model!r} is a Stable Diffusion model: draw from it with `sag generate`"
        )
    raise ValueError(
        f"model={model!r} is of the class {class_name}: it must be one of"
        f" {', '.join(PIXEL_CLASSES)}"
    )
