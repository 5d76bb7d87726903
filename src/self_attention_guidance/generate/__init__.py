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

from ..checks import check_count, check_prompts, seeds_of
from .comparison import Comparison, check_scales, compare
from .drawing import GeneratedImage, PromptArtist
from .files import (
    check_folder,
    check_free,
    next_index,
    picture_path,
    save_png,
)
from .grid import draw_grid, draw_tiles, overlay_attended
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
    find_model,
    load_pipeline,
)
from .pixel_drawing import draw_samples, to_image, to_uint8
from .pixel_models import (
    LoadedPixelModel,
    find_classifier,
    find_pixel_model,
    load_pixel_model,
)
from .sample_settings import SampleSettings
from .samples import (
    FinishedSamples,
    SampleRun,
    check_samples_path,
)
from .sampling import generate
from .schedulers import (
    check_scheduler_name,
    make_pixel_scheduler,
    make_scheduler,
    scheduler_label,
    scheduler_names,
)
from .settings import GenerationSettings, check_size

__all__ = [
    "Comparison",
    "FinishedSamples",
    "GeneratedImage",
    "GenerationSettings",
    "LoadedPipeline",
    "LoadedPixelModel",
    "Parameters",
    "PromptArtist",
    "Record",
    "SampleRun",
    "SampleSettings",
    "check_count",
    "check_folder",
    "check_free",
    "check_prompts",
    "check_samples_path",
    "check_scales",
    "check_scheduler_name",
    "check_size",
    "compare",
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
    "load_pipeline",
    "load_pixel_model",
    "make_pixel_scheduler",
    "make_scheduler",
    "method_label",
    "overlay_attended",
    "parse_parameters",
    "next_index",
    "picture_path",
    "read_parameters",
    "read_record",
    "read_text",
    "save_png",
    "scheduler_label",
    "scheduler_names",
    "seeds_of",
    "to_image",
    "to_uint8",
]
