"""The network, of the kind of Dhariwal and Nichol (ADM, arXiv 2105.05233), and its schedule."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention

from classes import NULL_LABEL, SIZE


def build_unet() -> UNet2DModel:
    """Three resolutions, 32 to 8 pixels, with attention at 16x16 and 8x8."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=32,
        # 32 groups, as ADM has, would normalise each of the 32 channels by itself: no mean colour
        norm_num_groups=8,
        attn_norm_num_groups=8,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=NULL_LABEL + 1,
    )


def set_attention_processor(unet: UNet2DModel, processor: Any) -> None:
    """Let every attention layer of `unet` compute by `processor`."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)


def build_scheduler() -> DDPMScheduler:
    """The cosine schedule, which suits small pictures; fresh noise at every step mends errors.

    Steps are spaced as ADM spaces them, from the last timestep to the first: diffusers' default
    begins short of the last, where the cosine schedule still has signal. At the last it has hardly
    any, so that the predicted picture must be kept within its range. Thresholding with the greatest
    value 1 does what clipping does, and other than `clip_sample` it is passed on to DPM-Solver++,
    UniPC and their like by `from_config`.
    """
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="fixed_small",
        timestep_spacing="linspace",
        thresholding=True,
        sample_max_value=1.0,
    )
