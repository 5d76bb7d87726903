"""ADM's noisy classifier: the encoder of a U-Net with attention pooling.

Source: Dhariwal and Nichol, arXiv 2105.05233, Sec. 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .architecture import UNetArchitecture, architecture_of, complete_config
from .rules import Rule, convert, without_taps
from .unet import ADMUNet2DModel, encoder_rules, unet_config


class NoisyClassifier(ModelMixin, ConfigMixin):
    """A classifier of noisy pictures, whose gradient guides ADM.

    Source: Dhariwal and Nichol, arXiv 2105.05233, Sec. 4.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        sample_size: int = 64,
        in_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 384, 512),
        layers_per_block: int = 4,
        attention_head_dim: int = 64,
        down_block_types: Sequence[str] = (
            "ResnetDownsampleBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        downsample_type: str = "resnet",
        resnet_time_scale_shift: str = "scale_shift",
        timestep_channels: int = 128,
        use_fp16: bool = False,
    ) -> None:
        """Make a classifier with random weights.

        Args:
            num_classes: Number of classes, and of logits.
            sample_size: Height and width of a picture, in pixels.
            in_channels: Channels of a picture.
            block_out_channels: Channels of each level, the finest first.
            layers_per_block: Residual blocks of each level.
            attention_head_dim: Channels of an attention head, also in the pooling.
            down_block_types: Kind of block at each level: "AttnDownBlock2D", or without attention
                "ResnetDownsampleBlock2D" or "DownBlock2D".
            downsample_type: "resnet" or "conv".
            resnet_time_scale_shift: "scale_shift" or "default".
            timestep_channels: Width of the sinusoids of the timestep.
            use_fp16: Compute the encoder in float16, with float32 weights and norms.
        """
        super().__init__()
        unet = ADMUNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            down_block_types=tuple(down_block_types),
            up_block_types=("UpBlock2D",) * len(down_block_types),
            downsample_type=downsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            time_embedding_dim=4 * timestep_channels,
            timestep_channels=timestep_channels,
            attn_norm_num_groups=32,
        )
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.conv_in = unet.conv_in
        self.down_blocks = unet.down_blocks
        self.mid_block: Any = unet.mid_block
        width, side = block_out_channels[-1], sample_size >> (len(block_out_channels) - 1)
        self.norm_out = nn.GroupNorm(32, width)
        self.pool = AttentionPooling(width, side * side, attention_head_dim, num_classes)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Classify noisy pictures.

        Args:
            sample: x_t, (batch, channels, height, width) of the config's size, clean values in
                [-1, 1].
            timestep: Timesteps as the original gets them, (batch,) or a single number.

        Returns:
            Logits, (batch, classes).
        """
        config: Any = self.config
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        with torch.autocast(sample.device.type, torch.float16, enabled=config.use_fp16):
            time = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
            hidden = self.conv_in(sample)
            for block in self.down_blocks:
                hidden, _ = block(hidden, time)
            hidden = self.mid_block(hidden, time)
        return self.pool(F.silu(self.norm_out(hidden.to(sample.dtype))))


# Saved pipelines name a class by its module. This is the package, so that the class can be moved.
NoisyClassifier.__module__ = "self_attention_guidance"


class AttentionPooling(nn.Module):
    """Pools a feature map to one vector: its mean attends to the mean and all positions.

    Source: Radford et al., arXiv 2103.00020, Sec. 2.4, as in ADM's classifier.
    """

    def __init__(
        self, channels: int, positions: int, head_channels: int, out_channels: int
    ) -> None:
        """Make the layer for maps of `positions` pixels with `channels` features each."""
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(
            torch.randn(channels, positions + 1) / channels**0.5
        )
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Pool (batch, channels, height, width) to (batch, out_channels)."""
        tokens = features.flatten(2)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
        tokens = (tokens + self.positional_embedding).transpose(1, 2)
        sides = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = sides
        pooled = F.scaled_dot_product_attention(query[:, :, :1], key, value)
        return self.out(pooled.flatten(1))


def load_classifier(original: Mapping[str, Tensor], config: Mapping[str, Any]) -> NoisyClassifier:
    """Load one of ADM's classifiers.

    Args:
        original: The checkpoint's tensors.
        config: Arguments of the original `EncoderUNetModel`.

    Returns:
        The classifier, in eval mode.

    Raises:
        ValueError: The config is invalid or does not fit the checkpoint, or the pooling is not
            "attention".
    """
    complete = complete_config("classifier", config)
    if complete["pool"] != "attention":
        raise ValueError(f"config: pool={complete['pool']!r} must be 'attention'")
    if complete["num_head_channels"] == -1:
        raise ValueError("config: num_head_channels is missing: attention pooling needs it")
    architecture = architecture_of(complete)
    classifier = NoisyClassifier(**classifier_arguments(architecture))
    convert(original, classifier, _rules(architecture))
    return classifier.eval()


def classifier_arguments(architecture: UNetArchitecture) -> dict[str, Any]:
    """Return the arguments of `NoisyClassifier` for an architecture.

    Args:
        architecture: The arguments of the original constructor.
    """
    unet = unet_config(architecture)
    shared = inspect.signature(NoisyClassifier.__init__).parameters.keys() & unet.keys()
    return {"num_classes": architecture.out_channels} | {name: unet[name] for name in shared}


def _rules(architecture: UNetArchitecture) -> Iterator[Rule]:
    yield from encoder_rules(architecture)
    yield Rule("out.0", ["norm_out"])
    yield Rule("out.2.positional_embedding", ["pool.positional_embedding"], parameters=("",))
    yield Rule("out.2.qkv_proj", ["pool.qkv"], without_taps)
    yield Rule("out.2.c_proj", ["pool.out"], without_taps)
