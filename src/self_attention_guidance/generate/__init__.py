"""From prompts and seeds to pictures, files, metadata, comparison grids and files of samples.

Example:
    ```python
    from self_attention_guidance.generate import generate, load_pipeline, picture_path, save_png

    loaded = load_pipeline("emoji")
    settings = loaded.settings(num_inference_steps=25)  # the rest as the model recommends
    for picture in generate(loaded.pipeline, ["red heart", "grinning face"], settings, seed=7):
        save_png(picture.image, picture_path(".", picture.index, picture.seed), picture.record)
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exported

if TYPE_CHECKING:
    from ..checks import check_count, check_prompts, check_scales, seeds_of
    from .arguments import check_own_size, check_size
    from .axes import AXES, Axis, parse_axis, with_guidances
    from .classes import class_names, parse_classes
    from .comparison import Comparison, compare, compare_axes
    from .cost import Cost, generate_one
    from .devices import check_device_name, check_dtype_name, find_device, find_dtype
    from .drawing import GeneratedImage, PromptArtist
    from .files import (
        check_folder,
        check_free,
        check_samples_path,
        next_index,
        picture_path,
        save_png,
    )
    from .finding import find_classifier, find_model, find_pixel_model
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
    from .models import LoadedPipeline, load_pipeline
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
    "check_device_name",
    "check_dtype_name",
    "check_folder",
    "check_free",
    "check_own_size",
    "check_prompts",
    "check_samples_path",
    "check_scales",
    "check_scheduler_name",
    "check_size",
    "check_start",
    "class_names",
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
    "parse_classes",
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

# Importing torch and diffusers takes seconds; a wrong command line is reported without it.
__getattr__, __dir__ = exported(
    __name__,
    {
        "..checks": ("check_count", "check_prompts", "check_scales", "seeds_of"),
        ".arguments": ("check_own_size", "check_size"),
        ".axes": ("AXES", "Axis", "parse_axis", "with_guidances"),
        ".classes": ("class_names", "parse_classes"),
        ".comparison": ("Comparison", "compare", "compare_axes"),
        ".cost": ("Cost", "generate_one"),
        ".devices": ("check_device_name", "check_dtype_name", "find_device", "find_dtype"),
        ".drawing": ("GeneratedImage", "PromptArtist"),
        ".files": (
            "check_folder",
            "check_free",
            "check_samples_path",
            "next_index",
            "picture_path",
            "save_png",
        ),
        ".finding": ("find_classifier", "find_model", "find_pixel_model"),
        ".grid": ("draw_grid", "draw_tiles", "overlay_attended"),
        ".kinds": ("pipeline_for", "why_no_start"),
        ".metadata": (
            "Parameters",
            "Record",
            "format_parameters",
            "method_label",
            "parse_parameters",
            "read_parameters",
            "read_record",
            "read_text",
        ),
        ".models": ("LoadedPipeline", "load_pipeline"),
        ".pixel_drawing": ("draw_samples", "to_image", "to_uint8"),
        ".pixel_models": ("LoadedPixelModel", "load_pixel_model"),
        ".sample_settings": ("SampleSettings",),
        ".sampling": ("generate",),
        ".schedulers": (
            "check_scheduler_name",
            "make_pixel_scheduler",
            "make_scheduler",
            "scheduler_label",
            "scheduler_names",
        ),
        ".settings": ("GenerationSettings",),
        ".start_picture": ("check_start", "digests"),
    },
)
