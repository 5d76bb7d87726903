"""The networks that learn together, and the noise schedule that they learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from captions import MAX_TOKENS

TEXT_WIDTH = 192
CHANNELS = (96, 192)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, 192 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(channels: Sequence[int], dropout: float = 0.0) -> UNet2DConditionModel:
    """Two resolutions, 16x16 and 8x8, with self-attention at both and in the mid block."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        dropout=dropout,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with a last step of noise alone (arXiv 2305.08891).

    A schedule that leaves some signal in the last step teaches the model to read the mean colour
    from there, and sampling, which starts from noise alone, then draws every background gray.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


class Model(nn.Module):
    """The two networks that learn together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        """Networks that fit each other."""
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    @classmethod
    def new(cls, tokenizer: CLIPTokenizer, channels: Sequence[int], dropout: float = 0.0) -> Model:
        """Random weights; the text encoder fits `tokenizer`."""
        return cls(build_text_encoder(tokenizer), build_unet(channels, dropout))

    @classmethod
    def exported(cls, folder: Path, dropout: float) -> Model:
        """The networks of an exported model, in float32."""
        settings: dict[str, Any] = {"torch_dtype": torch.float32, "dropout": dropout}
        return cls(
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            UNet2DConditionModel.from_pretrained(folder / "unet", **settings),
        )

    @property
    def channels(self) -> list[int]:
        """The U-Net's width at each resolution."""
        return list(self.unet.config["block_out_channels"])

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The predicted velocity, (batch, 4, 16, 16)."""
        states = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, timesteps, states).sample
