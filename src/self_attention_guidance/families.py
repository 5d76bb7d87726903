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
        layer: Dotted path of the self-attention layer that is read by default.
        sample_argument: Name of the forward argument that holds x_t.
        cfg_layout: Order of the two halves of a batch under classifier-free guidance.
    """

    layer: str
    sample_argument: str
    cfg_layout: BatchLayout


FAMILIES = {
    "UNet2DConditionModel": Family(
        layer="mid_block.attentions.0.transformer_blocks.0.attn1",
        sample_argument="sample",
        cfg_layout="uncond_first",
    ),
}


def uncompiled(denoiser: nn.Module) -> nn.Module:
    """The module behind `torch.compile(denoiser)`, or the denoiser itself."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return inner if isinstance(inner, nn.Module) else denoiser


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
