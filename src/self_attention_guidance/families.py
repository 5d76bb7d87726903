"""What guidance needs to know about each class of denoiser: a table, no code per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

BatchLayout = Literal["single", "uncond_first", "cond_first"]


@dataclass(frozen=True)
class Family:
    """One class of denoisers.

    Attributes:
        layer: Dotted path of the self-attention layer that is read by default; "middle" stands
            for the middle one of a list of blocks.
        sample_argument: Name of the forward argument that holds x_t.
        cfg_layout: Order of the two halves of a batch under classifier-free guidance; "single" if
            the class has no such batches.
        null_label: Entry of the denoiser's config that holds the label of "no class", by which
            the halves are told apart where the pipeline does not tell; `None` if there is none.
    """

    layer: str
    sample_argument: str
    cfg_layout: BatchLayout
    null_label: str | None = None

    @property
    def tells_layout(self) -> bool:
        """Whether the batch layout follows from the denoiser and its arguments alone."""
        return self.cfg_layout == "single" or self.null_label is not None


FAMILIES = {
    "UNet2DConditionModel": Family(
        layer="mid_block.attentions.0.transformer_blocks.0.attn1",
        sample_argument="sample",
        cfg_layout="uncond_first",
    ),
    "UNet2DModel": Family(
        layer="mid_block.attentions.0",
        sample_argument="sample",
        cfg_layout="single",
    ),
    # The middle block, by argument: all blocks see the same grid of tokens, the first ones attend
    # to neighbours and the last ones serve the pixels, so that the middle is what the bottleneck
    # of a U-Net is, the layer that the paper reads. diffusers' examples of perturbed-attention
    # guidance, a relative of this method, take the middle block of transformers, too.
    "DiTTransformer2DModel": Family(
        layer="transformer_blocks.middle.attn1",
        sample_argument="hidden_states",
        cfg_layout="cond_first",
        null_label="num_embeds_ada_norm",
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
