"""From prompts and seeds to pictures, files, metadata, comparison grids and files of samples.

Example:
    ```python
    from self_attention_guidance.generate import generate, load_pipeline, picture_path, save_png

    loaded = load_pipeline("emoji")
    settings = loaded.settings(num_inference_steps=25)  # else as the model recommends
    for picture in generate(loaded.pipeline, ["red heart", "grinning face"], settings, seed=7):
        save_png(picture.image, picture_path(".", picture.index, picture.seed), picture.record)
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exported

if TYPE_CHECKING:
    from ..checks import check_count, check_prompts, check_scales, seeds_of
    from .arguments import check_size
    from .axes import AXES, Axis, parse_axis, with_guidances
    from .comparison import Comparison, compare, compare_axes
    from .cost import Cost, generate_one
    from .drawing import GeneratedImage, PromptArtist
    from .files import (
        check_folder,
        check_free,
        check_samples_path,
        next_index,
        picture_path,
        save_png,
    )
    from .finding import check_dtype_name, find_classifier, find_model, find_pixel_model
    from .grid import draw_grid, draw_tiles, overlay_attended
    from .kinds import pipeline_for, why_no_start
    from .metadata import (
        Parameters,
        Record,
        format_parameters,
        method_label,
        parse_parameters,
        read_parameters,
        read_record,
        read_text,
    )
    from .models import (
        LoadedPipeline,
        find_device,
        find_dtype,
        load_pipeline,
    )
    from .pixel_drawing import draw_samples, to_image, to_uint8
    from .pixel_models import LoadedPixelModel, load_pixel_model
    from .sample_settings import SampleSettings
    from .sampling import generate
    from .schedulers import (
        check_scheduler_name,
        make_pixel_scheduler,
        make_scheduler,
        scheduler_label,
        scheduler_names,
    )
    from .settings import GenerationSettings
    from .start_picture import check_start, digests

__all__ = [
    "AXES",
    "Axis",
    "Comparison",
    "Cost",
    "GeneratedImage",
    "GenerationSettings",
    "LoadedPipeline",
    "LoadedPixelModel",
    "Parameters",
    "PromptArtist",
    "Record",
    "SampleSettings",
    "check_count",
    "check_dtype_name",
    "check_folder",
    "check_free",
    "check_prompts",
    "check_samples_path",
    "check_scales",
    "check_scheduler_name",
    "check_size",
    "check_start",
    "compare",
    "compare_axes",
    "digests",
    "draw_grid",
    "draw_samples",
    "draw_tiles",
    "find_classifier",
    "find_device",
    "find_dtype",
    "find_model",
    "find_pixel_model",
    "format_parameters",
    "generate",
    "generate_one",
    "load_pipeline",
    "load_pixel_model",
    "make_pixel_scheduler",
    "make_scheduler",
    "method_label",
    "overlay_attended",
    "parse_axis",
    "parse_parameters",
    "next_index",
    "picture_path",
    "pipeline_for",
    "read_parameters",
    "read_record",
    "read_text",
    "save_png",
    "scheduler_label",
    "scheduler_names",
    "seeds_of",
    "to_image",
    "to_uint8",
    "why_no_start",
    "with_guidances",
]

# Importing torch and diffusers takes seconds, and wrong command lines are answered before that.
_HOMES = {
    "AXES": ".axes",
    "Axis": ".axes",
    "Comparison": ".comparison",
    "GeneratedImage": ".drawing",
    "GenerationSettings": ".settings",
    "LoadedPipeline": ".models",
    "LoadedPixelModel": ".pixel_models",
    "Parameters": ".metadata",
    "PromptArtist": ".drawing",
    "Record": ".metadata",
    "SampleSettings": ".sample_settings",
    "check_count": "..checks",
    "check_dtype_name": ".finding",
    "check_folder": ".files",
    "check_free": ".files",
    "check_prompts": "..checks",
    "check_samples_path": ".files",
    "check_scales": "..checks",
    "check_scheduler_name": ".schedulers",
    "check_size": ".arguments",
    "check_start": ".start_picture",
    "Cost": ".cost",
    "compare": ".comparison",
    "compare_axes": ".comparison",
    "digests": ".start_picture",
    "draw_grid": ".grid",
    "draw_samples": ".pixel_drawing",
    "draw_tiles": ".grid",
    "find_classifier": ".finding",
    "find_device": ".models",
    "find_dtype": ".models",
    "find_model": ".finding",
    "find_pixel_model": ".finding",
    "format_parameters": ".metadata",
    "generate": ".sampling",
    "generate_one": ".cost",
    "load_pipeline": ".models",
    "load_pixel_model": ".pixel_models",
    "make_pixel_scheduler": ".schedulers",
    "make_scheduler": ".schedulers",
    "method_label": ".metadata",
    "next_index": ".files",
    "overlay_attended": ".grid",
    "parse_axis": ".axes",
    "parse_parameters": ".metadata",
    "picture_path": ".files",
    "pipeline_for": ".kinds",
    "read_parameters": ".metadata",
    "read_record": ".metadata",
    "read_text": ".metadata",
    "save_png": ".files",
    "scheduler_label": ".schedulers",
    "scheduler_names": ".schedulers",
    "seeds_of": "..checks",
    "to_image": ".pixel_drawing",
    "to_uint8": ".pixel_drawing",
    "why_no_start": ".kinds",
    "with_guidances": ".axes",
}


__getattr__ = exported(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
