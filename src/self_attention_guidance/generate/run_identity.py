"""What decides how the pictures of a run of samples look."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..pipelines.adm import ADMPipeline
from .metadata import version_label
from .sample_settings import SampleSettings


def describe_run(pipeline: ADMPipeline, settings: SampleSettings, seed: int) -> dict[str, Any]:
    """Everything that pictures depend on, and nothing else: two equal runs draw the same.

    The number of pictures, the batch size and the device are not among it.

    Args:
        pipeline: The model with its scheduler and guidance.
        settings: Of the samples.
        seed: Of the first picture.

    Returns:
        Names and values that JSON can hold.
    """
    described: dict[str, Any] = {
        "version": version_label(),
        "unet": fingerprint(pipeline.unet),
        "null_label": pipeline.config["null_label"],
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "num_inference_steps": settings.num_inference_steps,
        "eta": float(settings.eta),
        "seed": seed,
        "classes": list(settings.classes),
    }
    described |= describe_scheduler(pipeline.scheduler)
    return described | _guidance(pipeline, settings) | _classifier(pipeline, settings)


def describe_scheduler(scheduler: Any) -> dict[str, Any]:
    """Class and configuration of a diffusers scheduler, as values that JSON can hold.

    Args:
        scheduler: The scheduler.
    """
    configuration = _named("scheduler", _public(scheduler.config))
    return {"scheduler": type(scheduler).__name__} | configuration


def fingerprint(module: nn.Module) -> str:
    """Identifies a network by its class, configuration and weights.

    Args:
        module: On any device.

    Returns:
        The class and a hash, for example "UNet2DModel 0a1b2c3d4e5f6071".
    """
    digest = hashlib.sha256()
    config: object = getattr(module, "config", None)
    known = _public(config) if isinstance(config, FrozenDict) else {}
    digest.update(json.dumps(known, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return f"{type(module).__name__} {digest.hexdigest()[:16]}"


def _guidance(pipeline: ADMPipeline, settings: SampleSettings) -> dict[str, Any]:
    scale = pipeline.guidance.scale if settings.sag_scale is None else settings.sag_scale
    if scale == 0:  # then nothing else of it has an effect
        return {"sag_scale": 0.0}
    chosen = dataclasses.asdict(pipeline.guidance) | {"scale": float(scale)}
    return {"guidance": type(pipeline.guidance).__name__} | _named("guidance", chosen)


def _classifier(pipeline: ADMPipeline, settings: SampleSettings) -> dict[str, Any]:
    scale = 1.0 if settings.classifier_scale is None else float(settings.classifier_scale)
    if pipeline.classifier is None or scale == 0:
        return {}
    return {"classifier": fingerprint(pipeline.classifier), "classifier_scale": scale}


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what only tells where it came from, as JSON has it."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(known, default=str))
