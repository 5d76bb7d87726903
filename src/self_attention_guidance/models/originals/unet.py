"""The U-Net of ADM and IDDPM as a diffusers model, and the table of rules that converts it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from .architecture import UNetArchitecture
from .rules import Rule, Split, qkv_by_head, qkv_by_part, without_taps

_RESIDUAL_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


class ADMUNet2DModel(UNet2DModel):
    """diffusers' `UNet2DModel` with settings that the config of that class does not have.

    Source: Dhariwal and Nichol, arXiv 2105.05233, and Nichol and Dhariwal, arXiv 2102.09672. It
    takes the same timesteps as the original network: if that was trained with rescaled timesteps,
    the scheduler's timesteps times `timestep_scale`.
    """

    def __init__(
        self,
        *,
        num_heads: int | None = None,
        num_heads_upsample: int | None = None,
        timestep_channels: int | None = None,
        timestep_scale: float = 1.0,
        use_fp16: bool = False,
        **unet: Any,
    ) -> None:
        """Make a network with random weights.

        Args:
            num_heads: Attention heads of every layer, whatever its width; `None` follows
                `attention_head_dim`.
            num_heads_upsample: The same for the decoder only; `None` is `num_heads`.
            timestep_channels: Width of the sinusoids of the timestep; `None` is that of the first
                block.
            timestep_scale: The network's timestep divided by the scheduler's.
            use_fp16: Compute in float16, with float32 weights and norms, as the original's
                half-precision torso does.
            **unet: Arguments of `UNet2DModel`.

        Raises:
            ValueError: The width of a layer is not a multiple of its heads.
        """
        super().__init__(**unet)
        self.register_to_config(
            num_heads=num_heads,
            num_heads_upsample=num_heads_upsample,
            timestep_channels=timestep_channels,
            timestep_scale=timestep_scale,
            use_fp16=use_fp16,
        )
        _set_heads(self, "down_blocks", num_heads)
        _set_heads(self, "mid_block", num_heads)
        _set_heads(
            self, "up_blocks", num_heads if num_heads_upsample is None else num_heads_upsample
        )
        if timestep_channels is not None:
            width = self.time_embedding.linear_1.out_features
            self.time_proj = Timesteps(
                timestep_channels, flip_sin_to_cos=True, downscale_freq_shift=0
            )
            self.time_embedding = TimestepEmbedding(timestep_channels, width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor, ...]:
        """Predict; shapes and arguments are those of `UNet2DModel.forward`."""
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, device=sample.device)
        config: Any = self.config
        with torch.autocast(sample.device.type, torch.float16, enabled=config.use_fp16):
            (output,) = super().forward(sample, timestep, class_labels, return_dict=False)
        output = output.to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def _with_parents_parameters() -> inspect.Signature:
    """Make the full signature, by which diffusers sorts the entries of a saved config."""
    own = list(inspect.signature(ADMUNet2DModel.__init__).parameters.values())[:-1]
    parents = list(inspect.signature(UNet2DModel.__init__).parameters.values())[1:]
    keywords = [parent.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parent in parents]
    return inspect.Signature([*own, *keywords])


# Saved pipelines name a class by its module. This is the package, so that the class can be moved.
ADMUNet2DModel.__module__ = "self_attention_guidance"
ADMUNet2DModel.__init__.__signature__ = _with_parents_parameters()  # type: ignore[attr-defined]


def _set_heads(unet: UNet2DModel, part: str, heads: int | None) -> None:
    for name, attention in unet.get_submodule(part).named_modules():
        if heads is None or not isinstance(attention, Attention):
            continue
        if attention.inner_dim % heads:
            raise ValueError(
                f"num_heads={heads} must divide the {attention.inner_dim} channels of {part}.{name}"
            )
        attention.heads = attention.sliceable_head_dim = heads
        attention.scale = (attention.inner_dim // heads) ** -0.5


def unet_config(architecture: UNetArchitecture) -> dict[str, Any]:
    """Return the arguments of `ADMUNet2DModel` for an architecture.

    Args:
        architecture: The arguments of the original constructor.
    """
    attends = architecture.attends
    # Blocks without attention have one class for each way to change the resolution.
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = plain if architecture.resblock_updown else ("DownBlock2D", "UpBlock2D")
    by_channels = architecture.num_head_channels != -1
    sampling = "resnet" if architecture.resblock_updown else "conv"
    upsample_heads = architecture.num_heads_upsample
    return {
        "sample_size": architecture.image_size,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "block_out_channels": architecture.widths,
        "layers_per_block": architecture.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if at else down for at in attends),
        "up_block_types": tuple("AttnUpBlock2D" if at else up for at in attends[::-1]),
        "downsample_type": sampling,
        "upsample_type": sampling,
        "resnet_time_scale_shift": "scale_shift"
        if architecture.use_scale_shift_norm
        else "default",
        "attention_head_dim": architecture.num_head_channels if by_channels else None,
        "num_heads": None if by_channels else architecture.num_heads,
        "num_heads_upsample": None if by_channels or upsample_heads == -1 else upsample_heads,
        "num_class_embeds": architecture.num_classes,
        "time_embedding_dim": 4 * architecture.model_channels,
        "timestep_channels": architecture.model_channels,
        "timestep_scale": architecture.timestep_scale,
        "use_fp16": architecture.use_fp16,
        "dropout": architecture.dropout,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
    }


def unet_rules(architecture: UNetArchitecture) -> Iterator[Rule]:
    """Yield the rules of a whole U-Net."""
    yield from encoder_rules(architecture)
    yield Rule("label_emb", ["class_embedding"])
    yield Rule("out.0", ["conv_norm_out"])
    yield Rule("out.2", ["conv_out"])
    yield from _decoder_rules(architecture)


def encoder_rules(architecture: UNetArchitecture) -> Iterator[Rule]:
    """Yield the rules of the half that classifiers share: time, input blocks and middle block."""
    yield Rule("time_embed.0", ["time_embedding.linear_1"])
    yield Rule("time_embed.2", ["time_embedding.linear_2"])
    yield Rule("input_blocks.0.0", ["conv_in"])
    number = 1
    last = len(architecture.widths) - 1
    for level in range(last + 1):
        block = f"down_blocks.{level}"
        for layer in range(architecture.num_res_blocks):
            source = f"input_blocks.{number}"
            yield from _residual_rules(f"{source}.0", f"{block}.resnets.{layer}")
            if architecture.attends[level]:
                split = _qkv_split(architecture, level)
                yield from _attention_rules(f"{source}.1", f"{block}.attentions.{layer}", split)
            number += 1
        if level < last:
            source = f"input_blocks.{number}.0"
            yield Rule(f"{source}.op", [f"{block}.downsamplers.0.conv"])
            yield from _residual_rules(source, f"{block}.downsamplers.0")
            number += 1
    yield from _residual_rules("middle_block.0", "mid_block.resnets.0")
    split = _qkv_split(architecture, last)
    yield from _attention_rules("middle_block.1", "mid_block.attentions.0", split)
    yield from _residual_rules("middle_block.2", "mid_block.resnets.1")


def _decoder_rules(architecture: UNetArchitecture) -> Iterator[Rule]:
    number = 0
    for level in reversed(range(len(architecture.widths))):
        block = f"up_blocks.{len(architecture.widths) - 1 - level}"
        attends = architecture.attends[level]
        for layer in range(architecture.num_res_blocks + 1):
            source = f"output_blocks.{number}"
            yield from _residual_rules(f"{source}.0", f"{block}.resnets.{layer}")
            if attends:
                split = _qkv_split(architecture, level, in_decoder=True)
                yield from _attention_rules(f"{source}.1", f"{block}.attentions.{layer}", split)
            number += 1
        if level > 0:
            source = f"output_blocks.{number - 1}.{2 if attends else 1}"
            yield Rule(f"{source}.conv", [f"{block}.upsamplers.0.conv"])
            yield from _residual_rules(source, f"{block}.upsamplers.0")


def _residual_rules(source: str, target: str) -> Iterator[Rule]:
    for name, here in _RESIDUAL_BLOCK.items():
        yield Rule(f"{source}.{name}", [f"{target}.{here}"])


def _attention_rules(source: str, target: str, split: Split) -> Iterator[Rule]:
    yield Rule(f"{source}.norm", [f"{target}.group_norm"])
    yield Rule(f"{source}.qkv", [f"{target}.{side}" for side in ("to_q", "to_k", "to_v")], split)
    yield Rule(f"{source}.proj_out", [f"{target}.to_out.0"], without_taps)


def _qkv_split(architecture: UNetArchitecture, level: int, in_decoder: bool = False) -> Split:
    if architecture.use_new_attention_order:
        return qkv_by_part
    return qkv_by_head(architecture.heads(level, in_decoder))
