"""Guidance methods, one file per paper, and the code that attaches them to a denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checks import GuidanceError
from ..lazy import exported
from .base import METHODS, Branch, Guidance
from .pag import PerturbedAttentionGuidance
from .sag import BlurGuidance, SelfAttentionGuidance
from .seg import SmoothedEnergyGuidance
from .several import GuidanceSum, guidance_of
from .slg import SkipLayerGuidance
from .tpg import TokenPerturbationGuidance

if TYPE_CHECKING:
    from .handle import GuidanceHandle, attach, detach
    from .step import Step

__all__ = [
    "METHODS",
    "BlurGuidance",
    "Branch",
    "Guidance",
    "GuidanceError",
    "GuidanceHandle",
    "GuidanceSum",
    "PerturbedAttentionGuidance",
    "SelfAttentionGuidance",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "Step",
    "TokenPerturbationGuidance",
    "attach",
    "detach",
    "guidance_of",
]

__getattr__, __dir__ = exported(
    __name__, {".handle": ("GuidanceHandle", "attach", "detach"), ".step": ("Step",)}
)
