"""Loading pixel-space models by name, folder or hub id."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ..models.builtin import RecommendedSettings
from ..models.versions import dtype_argument
from ..pipelines.adm import ADMPipeline
from .devices import find_device, find_dtype
from .finding import (
    find_classifier,
    find_pixel_model,
    is_bare_network,
    loading_failed,
    model_folder,
    recommended_by,
)
from .loaded import Loaded
from .sample_settings import SampleSettings
from .schedulers import make_pixel_scheduler
from .weights import refuse_missing_weights


@dataclass(frozen=True, kw_only=True)
class LoadedPixelModel(Loaded[SampleSettings]):
    """A pipeline with the recommended settings of its model.

    Attributes:
        name: Short name of the model, for metadata.
        pipeline: The pipeline on its device; `pipeline.guidance` holds the recommended settings, if
            there are any.
        recommended: What the model recommends; may be empty.
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
            ValueError: The scheduler does not suit the model.
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
    """Load a pixel-space model for guided sampling.

    Weights are read from safetensors files only, so that no code in a checkpoint is ever run.

    Args:
        model: Name of a builtin model, the folder of an `ADMPipeline`, `DDPMPipeline` or
            `DDIMPipeline`, or the id of a repository on the Hugging Face hub ("owner/name"). A
            `UNet2DModel` without a pipeline is sampled by diffusers' default `DDPMScheduler`.
        device: As in `find_device`.
        dtype: As in `find_dtype`, but "auto" is float32 for models that switch to float16
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
    if os.path.isdir(source):  # files from the hub are checked by their checksums
        refuse_missing_weights(model, pipeline, source)
    if classifier is not None:
        size = pipeline.unet.config.sample_size
        pipeline.register_modules(classifier=_load_classifier(classifier, size))
    if dtype == "auto" and pipeline.unet.config.get("use_fp16"):
        wanted = torch.float32
    recommended = recommended_by(source)
    if recommended.guidance:
        pipeline.guidance = recommended.make_guidance()
    return LoadedPixelModel(
        name=Path(source).name, pipeline=pipeline.to(target, wanted), recommended=recommended
    )


def _load_pipeline(model: str, source: str) -> Any:
    local = os.path.isdir(source)
    arguments: dict[str, Any] = {"use_safetensors": True, "local_files_only": local}
    arguments |= dtype_argument(torch.float32)
    try:
        if is_bare_network(model_folder(source)):
            unet: Any = UNet2DModel.from_pretrained(source, **arguments)
            return ADMPipeline(unet, DDPMScheduler())
        return ADMPipeline.from_pretrained(source, **arguments)
    except Exception as error:  # libraries raise all kinds of errors for what they cannot read
        raise ValueError(loading_failed(model, error)) from error


def _load_classifier(folder: str | Path, size: int) -> Any:
    from ..models.originals import NoisyClassifier

    path = find_classifier(folder)
    try:
        classifier: Any = NoisyClassifier.from_pretrained(
            str(path), use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # libraries raise all kinds of errors for unreadable files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"classifier={str(folder)!r} cannot be loaded: {reason}") from error
    if classifier.config.sample_size != size:
        raise ValueError(
            f"classifier={str(folder)!r} is for pictures of {classifier.config.sample_size} pixels,"
            f" the model draws {size}"
        )
    return classifier.eval()
