"""Load the paper's models from original checkpoints: ADM and its classifiers, IDDPM and DiT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exported

if TYPE_CHECKING:
    from .adm import original_scheduler
    from .classifier import NoisyClassifier
    from .dit import OriginalDiTModel, dit_scheduler
    from .loading import convert_original, load_original
    from .presets import KINDS, preset_names
    from .unet import ADMUNet2DModel

__all__ = [
    "ADMUNet2DModel",
    "KINDS",
    "NoisyClassifier",
    "OriginalDiTModel",
    "convert_original",
    "dit_scheduler",
    "load_original",
    "original_scheduler",
    "preset_names",
]

# Importing torch takes seconds; a wrong command line is reported without it.
__getattr__, __dir__ = exported(
    __name__,
    {
        ".adm": ("original_scheduler",),
        ".classifier": ("NoisyClassifier",),
        ".dit": ("OriginalDiTModel", "dit_scheduler"),
        ".loading": ("convert_original", "load_original"),
        ".presets": ("KINDS", "preset_names"),
        ".unet": ("ADMUNet2DModel",),
    },
)
