"""Controls: what attention contributes, told from what any blur of the same strength does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance


@dataclass(frozen=True)
class RandomMaskGuidance(SelfAttentionGuidance):
    """Self-Attention Guidance whose mask is shuffled: as much is blurred, but anywhere.

    A picture's mask at a step depends on its own attention alone, so that it does not change with
    the batch.
    """

    def mask(self, attention: Tensor) -> Tensor:
        """The shuffled positions, bool; `attention` is what each receives, (pictures, ...)."""
        chosen = super().mask(attention)
        shuffled = [
            row.flatten()[_permutation(received)].view_as(row)
            for row, received in zip(chosen, attention, strict=True)
        ]
        return torch.stack(shuffled)


def _permutation(received: Tensor) -> Tensor:
    seed = int(received.double().std() * 2**40) % 2**31
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(received.numel(), generator=generator)
