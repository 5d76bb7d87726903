"""Loading models by name, folder, file or hub id."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..denoiser.families import denoiser_of
from ..models.builtin import RecommendedSettings
from ..models.versions import dtype_argument
from ..pipelines.stable_diffusion import StableDiffusionSAGPipeline
from .arguments import with_defaults
from .devices import find_device, find_dtype
from .finding import (
    find_model,
    loading_failed,
    model_folder,
    model_index,
    recommended_by,
)
from .kinds import prompt_pipeline
from .loaded import Loaded
from .loras import add_loras
from .parts import parts_of_pipeline, refuse_unfit_parts
from .settings import GenerationSettings
from .weights import refuse_missing_weights, refuse_unloaded_weights


@dataclass(frozen=True, kw_only=True)
class LoadedPipeline(Loaded[GenerationSettings]):
    """A pipeline with the recommended settings of its model.

    Attributes:
        name: Short name of the model, for metadata.
        pipeline: A `StableDiffusionSAGPipeline` or a guided subclass of another pipeline, on its
            device; `pipeline.guidance` holds the recommended settings.
        recommended: What the model recommends, else its pipeline's defaults.
    """

    name: str
    pipeline: Any
    recommended: RecommendedSettings
    settings_class = GenerationSettings


def load_pipeline(
    model: str = "emoji",
    device: str = "auto",
    dtype: str = "auto",
    *,
    loras: Sequence[tuple[str, float]] = (),
    offload: str | None = None,
    is_compiled: bool = False,
) -> LoadedPipeline:
    """Load a text-to-image model for guided sampling.

    Weights are read from safetensors files only, so that no code in a checkpoint is ever run.

    Args:
        model: Name of a builtin model, a folder in diffusers format, a single `.safetensors`
            file of Stable Diffusion 1 or 2, or the id of a repository on the Hugging Face hub
            ("owner/name"). A builtin name wins over a folder; write `./emoji` for the folder.
        device: As in `find_device`.
        dtype: As in `find_dtype`.
        loras: LoRA files in safetensors format, and their scales.
        offload: "model" keeps one network at a time on the device, "sequential" one layer, which
            is slow; `None` keeps all networks there.
        is_compiled: Whether to compile the denoiser with `torch.compile`: the first picture takes
            long, later ones are faster.

    Returns:
        The pipeline on its device and its recommended settings.

    Raises:
        ValueError: The model or a LoRA is missing or cannot be loaded, or the device or dtype is
            unknown, or `offload` is given without a GPU.
    """
    target = find_device(device)
    if offload is not None and target.type == "cpu":
        raise ValueError(f"offload={offload!r} needs a GPU: the model runs on the CPU here")
    arguments: dict[str, Any] = dtype_argument(find_dtype(dtype, target))
    source, is_file = find_model(model)
    kind: Any = prompt_class(model, source)
    try:
        if is_file:
            pipeline = kind.from_single_file(source, **arguments)
        else:
            arguments |= {"use_safetensors": True, "local_files_only": os.path.isdir(source)}
            pipeline = kind.from_pretrained(source, **arguments)
    except Exception as error:  # libraries raise all kinds of errors for unreadable files
        raise ValueError(loading_failed(model, error)) from error
    if os.path.isdir(source):  # files from the hub are checked by their checksums
        refuse_missing_weights(model, pipeline, source)
    elif is_file:  # the parts of all others were checked when they were found
        refuse_unfit_parts(model, parts_of_pipeline(pipeline))
    refuse_unloaded_weights(model, pipeline)
    recommended = with_defaults(recommended_by(source), kind)
    pipeline.guidance = recommended.make_guidance()
    add_loras(pipeline, loras)
    if offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=target)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=target)
    else:
        pipeline.to(target)
    denoiser = denoiser_of(pipeline)
    if is_compiled and denoiser is not None:
        denoiser.compile()
    return LoadedPipeline(
        name=Path(source).stem if is_file else Path(source).name,
        pipeline=pipeline,
        recommended=recommended,
    )


def prompt_class(model: str, source: str) -> type[DiffusionPipeline]:
    """The class of pipeline that draws prompts with a model, guided.

    Args:
        model: As in `load_pipeline`.
        source: The folder, file or hub id that `find_model` found.

    Raises:
        ValueError: The model is of another kind, or does not exist.
    """
    if os.path.isfile(source):
        return StableDiffusionSAGPipeline
    folder = model_folder(source)
    return prompt_pipeline(model, model_index(model, folder), folder)
