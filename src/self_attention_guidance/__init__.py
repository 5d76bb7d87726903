"""Self-Attention Guidance (Hong et al., ICCV 2023, arXiv 2210.00939) for diffusion models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .lazy import exported

if TYPE_CHECKING:
    from .denoiser.families import Family, register_batch_arguments, register_family
    from .guidance import (
        BlurGuidance,
        Guidance,
        GuidanceError,
        GuidanceHandle,
        PerturbedAttentionGuidance,
        SelfAttentionGuidance,
        SkipLayerGuidance,
        SmoothedEnergyGuidance,
        Step,
        TokenPerturbationGuidance,
        attach,
        detach,
    )
    from .models.builtin import builtin_model
    from .models.originals import ADMUNet2DModel, NoisyClassifier, OriginalDiTModel, load_original
    from .pipelines.adm import ADMPipeline
    from .pipelines.dit import DiTSAGPipeline
    from .pipelines.modular import GuidanceGuider, SelfAttentionGuider
    from .pipelines.stable_diffusion import StableDiffusionSAGPipeline
    from .pipelines.stable_diffusion_xl import StableDiffusionXLSAGPipeline

__version__ = "0.2.0"

__all__ = [
    "SelfAttentionGuidance",
    "BlurGuidance",
    "PerturbedAttentionGuidance",
    "SmoothedEnergyGuidance",
    "SkipLayerGuidance",
    "TokenPerturbationGuidance",
    "Guidance",
    "Step",
    "GuidanceHandle",
    "GuidanceError",
    "attach",
    "detach",
    "Family",
    "register_family",
    "register_batch_arguments",
    "SelfAttentionGuider",
    "GuidanceGuider",
    "StableDiffusionSAGPipeline",
    "StableDiffusionXLSAGPipeline",
    "ADMPipeline",
    "DiTSAGPipeline",
    "load_original",
    "builtin_model",
    "ADMUNet2DModel",
    "NoisyClassifier",
    "OriginalDiTModel",
]

# Importing diffusers takes seconds, and the command line's --help must not wait for it.
# diffusers also looks here for the classes of saved models.
_exported, __dir__ = exported(
    __name__,
    {
        ".denoiser.families": ("Family", "register_batch_arguments", "register_family"),
        ".guidance": (
            "BlurGuidance",
            "Guidance",
            "GuidanceError",
            "GuidanceHandle",
            "PerturbedAttentionGuidance",
            "SelfAttentionGuidance",
            "SkipLayerGuidance",
            "SmoothedEnergyGuidance",
            "Step",
            "TokenPerturbationGuidance",
            "attach",
            "detach",
        ),
        ".models.builtin": ("builtin_model",),
        ".models.originals": (
            "ADMUNet2DModel",
            "NoisyClassifier",
            "OriginalDiTModel",
            "load_original",
        ),
        ".pipelines.adm": ("ADMPipeline",),
        ".pipelines.dit": ("DiTSAGPipeline",),
        ".pipelines.modular": ("GuidanceGuider", "SelfAttentionGuider"),
        ".pipelines.stable_diffusion": ("StableDiffusionSAGPipeline",),
        ".pipelines.stable_diffusion_xl": ("StableDiffusionXLSAGPipeline",),
    },
)


def __getattr__(name: str) -> Any:
    if name == "ModelMixin":
        # diffusers asks a package for the base class of the models that the package defines.
        return import_module("diffusers").ModelMixin
    return _exported(name)
