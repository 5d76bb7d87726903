"""Calls of a layer's attention kernels are kept apart from other work, and belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from self_attention_guidance import maths
from self_attention_guidance.denoiser.attention import Operands, received, standing_in


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


@pytest.mark.parametrize("kind", ["bool", "float", "both"])
def test_calls_with_and_without_a_bias_belong_together(kind: str) -> None:
    query, key = torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8)
    where = torch.rand(1, 1, 6, 6) < 0.7
    where[..., 0] = True
    added = torch.zeros(1, 1, 6, 6).masked_fill(~where, -torch.inf)
    given: list[Tensor | None] = {
        "bool": [None, where, where],
        "float": [added, None, added],
        "both": [where, None, added],
    }[kind]
    biases = [None if bias is None else added for bias in given]

    def each(biases: list[Tensor | None]) -> list[Operands]:
        parts = zip(query.split(1), key.split(1), biases, strict=True)
        return [Operands(q, k, k, None, bias) for q, k, bias in parts]

    found = received(each(given), 3, slice(0, 3), slice(0, 6))
    expected = [
        maths.attention_received(query[i : i + 1], key[i : i + 1], bias=biases[i]) for i in range(3)
    ]
    torch.testing.assert_close(found, torch.cat(expected))
    part = received(each(given), 3, slice(1, 3), slice(0, 6))
    torch.testing.assert_close(part, torch.cat(expected[1:]))


def test_a_layer_may_call_its_kernel_with_a_bias_and_without() -> None:
    query = torch.randn(2, 2, 6, 8)
    bias = torch.randn(6, 6)

    class Processor:
        def __call__(self, attention: nn.Module) -> None:
            F.scaled_dot_product_attention(query, query, query, attn_mask=bias)
            F.scaled_dot_product_attention(query, query, query)

    net = Net(Processor())
    with standing_in(net, "attn") as reading:
        net.attn()
    found = received(reading.noted, 4, slice(0, 4), slice(0, 6))
    plain = maths.attention_received(query, query)
    torch.testing.assert_close(found[2:], plain)
    torch.testing.assert_close(found[:2], maths.attention_received(query, query, bias=bias))
