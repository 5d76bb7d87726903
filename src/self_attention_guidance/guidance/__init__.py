"""Guidance methods, one file per paper, and the code that attaches them to a denoiser."""

from __future__ import annotations

from .base import METHODS, Branch, Guidance, Step
from .handle import GuidanceHandle, attach
from .pag import PerturbedAttentionGuidance
from .sag import BlurGuidance, SelfAttentionGuidance
from .seg import SmoothedEnergyGuidance
from .several import GuidanceSum, guidance_of
from .slg import SkipLayerGuidance
from .tpg import TokenPerturbationGuidance

__all__ = [
    "METHODS",
    "BlurGuidance",
    "Branch",
    "Guidance",
    "GuidanceHandle",
    "GuidanceSum",
    "PerturbedAttentionGuidance",
    "SelfAttentionGuidance",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "Step",
    "TokenPerturbationGuidance",
    "attach",
    "guidance_of",
]
