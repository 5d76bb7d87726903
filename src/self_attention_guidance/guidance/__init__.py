"""Guidances: one paper, one file, and what attaches them to a denoiser."""

from __future__ import annotations

from .attach import attach
from .base import METHODS, Branch, Guidance, Step
from .blur import BlurGuidance
from .handle import GuidanceHandle
from .pag import PerturbedAttentionGuidance
from .sag import SelfAttentionGuidance
from .seg import SmoothedEnergyGuidance
from .slg import SkipLayerGuidance
from .tpg import TokenPerturbationGuidance

__all__ = [
    "METHODS",
    "BlurGuidance",
    "Branch",
    "Guidance",
    "GuidanceHandle",
    "PerturbedAttentionGuidance",
    "SelfAttentionGuidance",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "Step",
    "TokenPerturbationGuidance",
    "attach",
]
