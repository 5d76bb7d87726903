"""A pipeline's weights as one file, by the names of the original Stable Diffusion code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

CONFIGURATION_OF_SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Where diffusers looks for what such a file does not hold."""

_UNET = {
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
}
_RESNET = {
    r"\.norm1": ".in_layers.0",
    r"\.conv1": ".in_layers.2",
    r"\.time_emb_proj": ".emb_layers.1",
    r"\.norm2": ".out_layers.0",
    r"\.conv2": ".out_layers.3",
    r"\.conv_shortcut": ".skip_connection",
}
_VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"group_norm": "norm",
    r"to_([qkv])": r"\1",
    r"to_out\.0": "proj_out",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"downsamplers\.0": "downsample",
    r"upsamplers\.0": "upsample",
    r"down_blocks\.(\d)\.": r"down.\1.",
    r"resnets\.": "block.",
}


def save_single_file(pipe: StableDiffusionPipeline, path: Path) -> Path:
    """Write the U-Net, VAE and text encoder of a Stable Diffusion 1 model to one file."""
    tensors: dict[str, Any] = {}
    layers, levels = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    attends = ["CrossAttn" in kind for kind in pipe.unet.config.up_block_types]
    for name, value in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(name, layers, attends)] = value
    for name, value in pipe.vae.state_dict().items():
        is_matrix = "attentions" in name and value.ndim == 2  # a 1x1 convolution there
        stored = value[:, :, None, None] if is_matrix else value
        tensors["first_stage_model." + _vae_name(name, levels)] = stored
    for name, value in pipe.text_encoder.state_dict().items():
        own = name.removeprefix("text_model.")  # older versions of transformers have it
        tensors["cond_stage_model.transformer.text_model." + own] = value
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    return path


def _renamed(name: str, names: dict[str, str]) -> str:
    for present, original in names.items():
        name = re.sub(present, original, name)
    return name


def _unet_name(name: str, layers: int, attends: list[bool]) -> str:
    def place(found: re.Match[str]) -> str:
        side, block, kind, number = found[1], int(found[2]), found[3], int(found[4])
        if side == "down":
            slot = (block + 1) * (layers + 1) if kind == "downsamplers" else None
            slot = slot or block * (layers + 1) + number + 1
            rest = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
            return f"input_blocks.{slot}.{rest}"
        slot = block * (layers + 1) + (layers if kind == "upsamplers" else number)
        rest = {"resnets": 0, "attentions": 1, "upsamplers": 1 + attends[block]}[kind]
        return f"output_blocks.{slot}.{rest}"

    if ".resnets." in name:
        name = _renamed(name, _RESNET)
    name = _renamed(name, _UNET)
    name = re.sub(r"^(down|up)_blocks\.(\d)\.(\w+)\.(\d)", place, name)
    return re.sub(r"^(input_blocks\.\d+\.\d+)\.conv\.", r"\1.op.", name)


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    return _renamed(name, _VAE)
