"""The layers that each method weakens by default, with a row for each class of denoisers.

A denoiser without a row gets the default layer of `denoiser.families`, or the block of that layer.
It is the middle one, by argument, not by measurement.
"""

from __future__ import annotations

from torch import nn

from ..denoiser.families import default_layer, uncompiled
from ..denoiser.layers import block_of

_MID = {"UNet2DConditionModel": ("mid",), "UNet2DModel": ("mid",)}

DEFAULT_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "pag": {
        # The choice of the authors for Stable Diffusion and ADM (arXiv 2403.17377, Sec. 5), and of
        # diffusers' StableDiffusionPAGPipeline and StableDiffusionXLPAGPipeline.
        **_MID,
        # diffusers' examples: `blocks.14` of 28 for PixArtSigmaPAGPipeline, 14 of 40 for
        # HunyuanDiTPAGPipeline. The default of these classes, `blocks.1`, is a regular expression
        # that also matches 10 to 19.
        "PixArtTransformer2DModel": ("transformer_blocks.14/28",),
        "HunyuanDiT2DModel": ("blocks.14/40",),
        # The block that PAG's author perturbs in diffusers' StableDiffusion3PAGPipeline. In 3.5, it
        # is the first after the blocks that attend twice. Block 0, which others read for
        # Self-Attention Guidance, has seen no text yet.
        "SD3Transformer2DModel": ("transformer_blocks.13/24",),
    },
    "seg": {
        # The authors' `seg_applied_layers=['mid']` (SEG-SDXL, arXiv 2408.00760).
        **_MID,
        # What diffusers' SmoothedEnergyGuidance recommends for Stable Diffusion 3.5 Medium.
        "SD3Transformer2DModel": tuple(f"transformer_blocks.{n}/24" for n in (7, 8, 9)),
    },
    "slg": {
        # By argument: the same as for the other methods. No paper leaves out blocks of U-Nets.
        **_MID,
        # What Stability AI recommends for Stable Diffusion 3.5 Medium (`skip_guidance_layers` of
        # diffusers' StableDiffusion3Pipeline).
        "SD3Transformer2DModel": tuple(f"transformer_blocks.{n}/24" for n in (7, 8, 9)),
    },
    "tpg": {
        # The encoder (arXiv 2506.10036). For Stable Diffusion XL, the authors' code does not
        # shuffle in the first six of its 24 blocks.
        "UNet2DConditionModel": ("down",),
        "UNet2DModel": ("down",),
    },
}


def default_layers(method: str, denoiser: nn.Module, has_blocks: bool) -> tuple[str, ...]:
    """Return the names of the layers, or blocks, that a method weakens in a denoiser by default."""
    rows = DEFAULT_LAYERS.get(method, {})
    for base in type(uncompiled(denoiser)).__mro__:
        if base.__name__ in rows:
            return rows[base.__name__]
    layer = default_layer(denoiser)
    return (block_of(denoiser, layer) if has_blocks else layer,)
