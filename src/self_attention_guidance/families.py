"""What guidance needs to know about each class of denoiser: a table, no code per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

BatchLayout = Literal["single", "uncond_first", "cond_first", "cond_call_first"]


@dataclass(frozen=True)
class Packing:
    """How latents are packed into a sequence of tokens, (batch, tokens, channels).

    Attributes:
        ids: Name of the forward argument that tells where tokens lie: "img_ids" holds a row and a
            column for each, "img_shapes" the rows and columns of each picture.
        patch: Side of the square of latent pixels that makes a token.
    """

    ids: Literal["img_ids", "img_shapes"]
    patch: int = 2


@dataclass(frozen=True)
class Family:
    """One class of denoisers.

    Attributes:
        layer: Dotted path of the self-attention layer that is read by default; "middle" stands
            for the middle one of a list of blocks.
        sample_argument: Name of the forward argument that holds x_t.
        cfg_layout: What diffusers' pipelines do under classifier-free guidance: the order of the
            two halves of a batch, or "cond_call_first" for two calls, the conditional one first;
            "single" if the class has no such guidance.
        null_label: Entry of the denoiser's config that holds the label of "no class", by which
            the halves are told apart where the pipeline does not tell; `None` if there is none.
        timestep_scale: The timestep that pipelines give to the network, over the scheduler's.
        joint: Where the picture's tokens lie in attention over picture and text together; `None`
            if attention is over the picture alone.
        packing: How the latents are packed; `None` if they are (batch, channels, height, width).
    """

    layer: str
    sample_argument: str = "hidden_states"
    cfg_layout: BatchLayout = "uncond_first"
    null_label: str | None = None
    timestep_scale: float = 1.0
    joint: Literal["picture_first", "picture_last"] | None = None
    packing: Packing | None = None

    @property
    def tells_layout(self) -> bool:
        """Whether the batch layout follows from the denoiser and its arguments alone."""
        return self.cfg_layout in ("single", "cond_call_first") or self.null_label is not None


FAMILIES = {
    "UNet2DConditionModel": Family(
        layer="mid_block.attentions.0.transformer_blocks.0.attn1",
        sample_argument="sample",
    ),
    "UNet2DModel": Family(
        layer="mid_block.attentions.0",
        sample_argument="sample",
        cfg_layout="single",
    ),
    # The middle block of transformers, by argument: all blocks see the same grid of tokens, the
    # first ones attend to neighbours and the last ones serve the pixels, so that the middle is what
    # the bottleneck of a U-Net is, the layer that the paper reads. diffusers' examples of
    # perturbed-attention guidance, a relative of this method, take the middle block, too.
    "DiTTransformer2DModel": Family(
        layer="transformer_blocks.middle.attn1",
        cfg_layout="cond_first",
        null_label="num_embeds_ada_norm",
    ),
    "PixArtTransformer2DModel": Family(layer="transformer_blocks.middle.attn1"),
    "HunyuanDiT2DModel": Family(layer="blocks.middle.attn1"),
    "SD3Transformer2DModel": Family(
        layer="transformer_blocks.middle.attn",
        joint="picture_first",
    ),
    "AuraFlowTransformer2DModel": Family(
        layer="single_transformer_blocks.middle.attn",
        timestep_scale=1e-3,
        joint="picture_last",
    ),
    "FluxTransformer2DModel": Family(
        layer="single_transformer_blocks.middle.attn",
        cfg_layout="cond_call_first",
        timestep_scale=1e-3,
        joint="picture_last",
        packing=Packing("img_ids"),
    ),
    "ChromaTransformer2DModel": Family(
        layer="single_transformer_blocks.middle.attn",
        cfg_layout="cond_call_first",
        timestep_scale=1e-3,
        joint="picture_last",
        packing=Packing("img_ids"),
    ),
    "QwenImageTransformer2DModel": Family(
        layer="transformer_blocks.middle.attn",
        cfg_layout="cond_call_first",
        timestep_scale=1e-3,
        joint="picture_last",
        packing=Packing("img_shapes"),
    ),
}


def uncompiled(denoiser: nn.Module) -> nn.Module:
    """The module behind `torch.compile(denoiser)`, or the denoiser itself."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return inner if isinstance(inner, nn.Module) else denoiser


def default_layer(denoiser: nn.Module) -> str:
    """Dotted path of the layer that the table names for a denoiser.

    Raises:
        ValueError: The class is not in the table.
    """
    path, module = "", uncompiled(denoiser)
    for name in family_of(denoiser).layer.split("."):
        if name == "middle" and isinstance(module, nn.ModuleList):
            name = str(len(module) // 2)
        path = f"{path}.{name}" if path else name
        module = getattr(module, name, None)
    return path


def family_of(denoiser: nn.Module) -> Family:
    """The table's row for a denoiser or one of its subclasses.

    Raises:
        ValueError: The class is not in the table.
    """
    inner = uncompiled(denoiser)
    for base in type(inner).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise ValueError(
        f"denoiser {type(inner).__name__} is not supported; supported: {', '.join(FAMILIES)}"
    )
