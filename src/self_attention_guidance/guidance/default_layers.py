"""The layers that a method weakens unless one says otherwise: a row for each class of denoisers.

What has no row gets the layer, or its block, that the table of denoisers names: the middle one, by
argument (see `denoiser.families`).
"""

from __future__ import annotations

from torch import nn

from ..denoiser.families import default_layer, uncompiled
from ..denoiser.layers import block_of

_MID = {"UNet2DConditionModel": ("mid",), "UNet2DModel": ("mid",)}

DEFAULT_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "pag": {
        # The authors' choice for Stable Diffusion and ADM (arXiv 2403.17377, Sec. 5), and that of
        # diffusers' StableDiffusionPAGPipeline and StableDiffusionXLPAGPipeline.
        **_MID,
        # diffusers' examples: `blocks.14` of 28 of PixArtSigmaPAGPipeline, 14 of 40 of
        # HunyuanDiTPAGPipeline. The default of their classes, `blocks.1`, is a regular expression
        # that also means 10 to 19.
        "PixArtTransformer2DModel": ("transformer_blocks.14/28",),
        "HunyuanDiT2DModel": ("blocks.14/40",),
        # The block that PAG's author perturbs in diffusers' StableDiffusion3PAGPipeline, the first
        # behind those of 3.5 that attend twice. Block 0, which others read for Self-Attention
        # Guidance, has seen no text yet.
        "SD3Transformer2DModel": ("transformer_blocks.13/24",),
    },
    "seg": {
        # The authors' `seg_applied_layers=['mid']` (SEG-SDXL, arXiv 2408.00760).
        **_MID,
        # What diffusers' SmoothedEnergyGuidance recommends for Stable Diffusion 3.5 Medium.
        "SD3Transformer2DModel": tuple(f"transformer_blocks.{n}/24" for n in (7, 8, 9)),
    },
    "slg": {
        # By argument, as for the other methods: no paper leaves out blocks of U-Nets.
        **_MID,
        # What Stability AI recommends for Stable Diffusion 3.5 Medium (`skip_guidance_layers` of
        # diffusers' StableDiffusion3Pipeline).
        "SD3Transformer2DModel": tuple(f"transformer_blocks.{n}/24" for n in (7, 8, 9)),
    },
    "tpg": {
        # The encoder (arXiv 2506.10036). The authors' code for Stable Diffusion XL leaves out the
        # first six of its 24 blocks.
        "UNet2DConditionModel": ("down",),
        "UNet2DModel": ("down",),
    },
}


def default_layers(method: str, denoiser: nn.Module, has_blocks: bool) -> tuple[str, ...]:
    """Names of the layers, or blocks, that a method weakens by default in a denoiser."""
    rows = DEFAULT_LAYERS.get(method, {})
    for base in type(uncompiled(denoiser)).__mro__:
        if base.__name__ in rows:
            return rows[base.__name__]
    layer = default_layer(denoiser)
    return (block_of(denoiser, layer) if has_blocks else layer,)
