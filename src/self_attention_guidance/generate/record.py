"""A record of everything that decides how pictures look, for metadata and to compare runs.

A record holds JSON values:

- "settings": arguments of `GenerationSettings` or `SampleSettings`, without the scale of guidance;
- "guidance": what `Guidance.from_dict` takes;
- "scheduler" and "scheduler_config": what `make_scheduler` takes;
- "version" of this package and "dtype" of the network;
- "loras": files and scales, if there are any;
- "weakened_predictions": how many there were; 0 if no step was guided;
- what the caller adds, such as "model", "prompt", "seed" and "size", (width, height) in pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..denoiser.families import denoiser_of
from ..guidance import Guidance, GuidanceSum
from ..pipelines.adm import ADMPipeline
from .metadata import Record, version_label
from .sample_settings import SampleSettings
from .settings import GenerationSettings


def describe(pipeline: Any, settings: GenerationSettings | SampleSettings, **more: Any) -> Record:
    """The record of pictures.

    Args:
        pipeline: The model with its scheduler and guidance.
        settings: Settings of the pictures.
        **more: Further entries.
    """
    denoiser = cast("Any", denoiser_of(pipeline))
    record = {
        "version": version_label(),
        **more,
        **choices(settings, pipeline.guidance, pipeline.scheduler),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        **({"loras": pipeline.loras} if pipeline.loras else {}),
    }
    return json.loads(json.dumps(record, default=_plain))


def choices(
    settings: GenerationSettings | SampleSettings,
    guidance: Guidance | GuidanceSum,
    scheduler: Any,
) -> Record:
    """The part of a record that is not about the model, the prompt or the machine.

    Args:
        settings: Settings of the pictures.
        guidance: Their guidance.
        scheduler: Their scheduler.
    """
    shared = dataclasses.asdict(settings)
    scale = shared.pop("sag_scale")
    chosen = {
        "settings": shared,
        "guidance": _guidance(guidance, scale),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": _public(scheduler.config),
    }
    return json.loads(json.dumps(chosen, default=_plain))


def describe_samples(
    pipeline: ADMPipeline,
    settings: SampleSettings,
    networks: Mapping[str, str] | None = None,
    **more: Any,
) -> Record:
    """The record of samples. Two runs with equal records draw the same samples.

    It does not hold the number of pictures, the batch size and the device.

    Args:
        pipeline: The model with its scheduler and guidance.
        settings: Settings of the samples.
        networks: What `fingerprints` returned for the pipeline, if it is known already.
        **more: Further entries.
    """
    scale = settings.classifier_scale
    if pipeline.classifier is None:
        scale = None
    elif scale is None:
        scale = 1.0
    return describe(
        pipeline,
        dataclasses.replace(settings, classifier_scale=scale),
        networks=networks or fingerprints(pipeline, with_classifier=bool(scale)),
        null_label=pipeline.config["null_label"],
        **more,
    )


def difference(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """The values of two records that differ, in one line: "guidance.every=3, not 4; seed=0, not 1".

    Args:
        earlier: The values of the earlier picture.
        present: The values of the present one.

    Returns:
        The line, with three differences at most; `None` if the records are equal.
    """
    before, now = _flat(earlier), _flat(present)
    names = [n for n in {**now, **before} if before.get(n) != now.get(n)]
    changes = [
        f"{n.removeprefix('settings.')}={before.get(n)!r:.80}, not {now.get(n)!r:.80}"
        for n in names
    ]
    more = [f"{len(changes) - 3} more"] if len(changes) > 3 else []
    return "; ".join(changes[:3] + more) or None


def fingerprints(pipeline: Any, with_classifier: bool = True) -> dict[str, str]:
    """Identify the networks that a pipeline draws with; fingerprints by name.

    Args:
        pipeline: The model.
        with_classifier: Whether its classifier, if it has one, is used.
    """
    return {
        name: fingerprint(component)
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and (name != "classifier" or with_classifier)
    }


def fingerprint(module: nn.Module) -> str:
    """Identify a network by its class, configuration and weights.

    Args:
        module: A network on any device; its weights may be offloaded.

    Returns:
        The class and a hash, for example "UNet2DModel 0a1b2c3d4e5f6071".
    """
    digest = hashlib.sha256()
    config: object = getattr(module, "config", None)
    known = _public(config) if isinstance(config, FrozenDict) else {}
    digest.update(json.dumps(known, sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights: Any = _offloaded(module, name) if tensor.is_meta else tensor
        flat = weights.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return f"{type(module).__name__} {digest.hexdigest()[:16]}"


def _offloaded(module: nn.Module, name: str) -> torch.Tensor:
    """A weight that accelerate puts into its layer only while that computes."""
    layer, _, rest = name.rpartition(".")
    while True:
        hook = getattr(module.get_submodule(layer), "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            weights = getattr(each, "weights_map", None)
            if weights is not None and rest in weights:
                return weights[rest]
        if not layer:
            raise ValueError(f"the weights {name} of {type(module).__name__} are not there")
        layer, _, last = layer.rpartition(".")  # one hook may move the weights of several layers
        rest = f"{last}.{rest}"


def _guidance(guidance: Guidance | GuidanceSum, scale: float | None) -> dict[str, Any]:
    if scale is not None:
        guidance = dataclasses.replace(guidance, scale=float(scale))
    if guidance.scale == 0:  # then its other settings have no effect
        return {"method": guidance.method, "scale": 0.0}
    return guidance.to_dict()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the entries that only say where it came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _plain(value: Any) -> Any:
    """Convert what JSON can't hold: arrays to lists, all else to text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
