"""Guidances: one paper, one file, and what attaches them to a denoiser."""

from __future__ import annotations

from .attach import attach
from .base import METHODS, Branch, Guidance, Step
from .blur import BlurGuidance
from .handle import GuidanceHandle
from .pag import PerturbedAttentionGuidance
from .sag import SelfAttentionGuidance

__all__ = [
    "METHODS",
    "BlurGuidance",
    "Branch",
    "Guidance",
    "GuidanceHandle",
    "PerturbedAttentionGuidance",
    "SelfAttentionGuidance",
    "Step",
    "attach",
]
