"""Calls of a layer's attention kernels are told from other work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from self_attention_guidance.denoiser.attention import standing_in


class Layer(nn.Module):
    """An attention layer of 2 heads, whose processor is any function of it and what it is given."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, *given: Any) -> Any:
        return self.processor(self, *given)


class Net(nn.Module):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.attn = Layer(processor)


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    empty = query.new_empty(len(query), query.shape[1], key.shape[1])
    return torch.baddbmm(empty, query, key.transpose(1, 2), beta=0, alpha=0.5)


def test_other_products_are_not_attention() -> None:
    query, key, value = (torch.randn(4, n, 8) for n in (6, 5, 5))

    class Processor:
        def __call__(self, attention: nn.Module) -> Tensor:
            scores = scores_of(query, key)
            torch.bmm(value, value.transpose(1, 2))  # not of the scores' shape
            return torch.bmm(scores.softmax(dim=-1), value)

    class Unused:
        def __call__(self, attention: nn.Module) -> Tensor:
            scores_of(query, key)
            return torch.bmm(query, value.transpose(1, 2))

    net = Net(Processor())
    with standing_in(net, "attn") as reading:
        net.attn()
    (noted,) = reading.noted
    assert noted.value is value
    net = Net(Unused())
    with standing_in(net, "attn", lambda operands, kernel: operands.value) as reading:
        assert torch.equal(net.attn(), query @ value.transpose(1, 2))
    assert not reading.was_called
