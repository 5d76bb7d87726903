"""The tensor arithmetic: properties that hold for any input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from self_attention_guidance import SelfAttentionGuidance, maths
from tiny import TEXT_WIDTH, tiny_scheduler, tiny_unet


def test_attention_received_is_the_column_sum_of_the_mean_map() -> None:
    query, key = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    explicit = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).mean(1).sum(1)
    torch.testing.assert_close(maths.attention_received(query, key, 0.5), explicit)


def test_attention_received_has_mean_one_and_does_not_depend_on_slicing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    whole = maths.attention_received(query, key)
    monkeypatch.setattr(maths, "_PROBABILITIES_AT_ONCE", 7 * 2 * 3 * 20)
    torch.testing.assert_close(maths.attention_received(query, key), whole)
    torch.testing.assert_close(whole.mean(1), torch.ones(2))


@pytest.mark.parametrize("picture", [slice(0, 12), slice(5, 17), slice(8, 20)])
@pytest.mark.parametrize("bias", [None, "additive", "keys", "queries and keys"])
def test_attention_of_a_picture_beside_text(
    picture: slice, bias: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    seen = torch.rand(2, 1, 20, 20) < 0.7
    seen |= torch.eye(20, dtype=torch.bool)  # every query sees something
    hidden = torch.where(seen, 0.0, -torch.inf)
    biases = {
        None: None,
        "additive": torch.randn(2, 1, 20, 20),
        "keys": hidden[:, :, 8:9],
        "queries and keys": hidden,
    }
    given_bias = biases[bias]
    added = torch.zeros(()) if given_bias is None else given_bias
    weights = (query @ key.transpose(-1, -2) * 8**-0.5 + added).softmax(-1)
    explicit = weights[..., picture, picture].mean(1).sum(1)
    explicit = explicit / explicit.mean(1, keepdim=True)
    monkeypatch.setattr(maths, "_PROBABILITIES_AT_ONCE", 5 * 2 * 3 * 20)
    received = maths.attention_received(query, key, bias=given_bias, picture=picture)
    torch.testing.assert_close(received, explicit)


class LargestSoftmax(TorchDispatchMode):
    """Notes the size of the largest attention map that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func is torch.ops.aten._softmax.default:
            self.size = max(self.size, output.numel())
        return output


def test_a_large_attention_map_is_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 400, 4)
    monkeypatch.setattr(maths, "_PROBABILITIES_AT_ONCE", 10_000)
    with LargestSoftmax() as largest:
        maths.attention_received(query, query)
    assert 0 < largest.size <= 10_000


def test_attention_is_computed_for_the_guided_rows_alone() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(2)
    x, states = torch.randn(2, 4, 16, 16), torch.randn(4, 7, TEXT_WIDTH)
    guidance = SelfAttentionGuidance()
    layout: Any = {"scheduler": scheduler, "batch_layout": "uncond_first"}
    with torch.no_grad(), guidance.attach(unet, **layout), LargestSoftmax() as largest:
        unet(torch.cat([x, x]), scheduler.timesteps[0], states)
    tokens, heads = 8 * 8, unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads
    assert largest.size == 2 * heads * tokens**2


def test_mask_is_strictly_above_the_threshold() -> None:
    received = torch.tensor([0.5, 1.0, 1.5])
    assert SelfAttentionGuidance().mask(received).tolist() == [False, False, True]
    assert SelfAttentionGuidance(threshold=0.4).mask(received).all()


@pytest.mark.parametrize(("sigma", "taps"), [(1.0, 9), (3.0, 31), (0.4, 3)])
def test_blur_is_an_explicit_two_dimensional_convolution(sigma: float, taps: int) -> None:
    image = torch.randn(2, 3, 32, 40)
    offsets = torch.arange(taps) - taps // 2
    row = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = row[:, None] * row[None, :]
    kernel = (kernel / kernel.sum()).expand(3, 1, taps, taps)
    padded = F.pad(image, (taps // 2,) * 4, mode="reflect")
    expected = F.conv2d(padded, kernel, groups=3)
    torch.testing.assert_close(maths.gaussian_blur(image, sigma, taps), expected)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    sigma=st.floats(0.1, 20),
    radius=st.integers(0, 15),
)
def test_blur_keeps_constants_at_every_size(
    height: int, width: int, sigma: float, radius: int
) -> None:
    image = torch.full((1, 2, height, width), 0.7)
    torch.testing.assert_close(maths.gaussian_blur(image, sigma, 2 * radius + 1), image)


def test_no_blur_and_no_mask_change_nothing() -> None:
    x0 = torch.randn(2, 4, 9, 11)
    mask = torch.rand(2, 3, 3) > 0.5
    assert torch.equal(maths.degrade(x0, mask, 0.0, 9), x0)
    assert torch.equal(maths.degrade(x0, torch.zeros_like(mask), 1.0, 9), x0)


def test_degrade_blurs_inside_the_mask_only() -> None:
    x0 = torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1] = True
    degraded = maths.degrade(x0, mask, 2.0, 9)
    assert torch.equal(degraded[:, :, 4:], x0[:, :, 4:])
    assert torch.equal(degraded[:, :, :4, :4], x0[:, :, :4, :4])
    everywhere = maths.degrade(x0, None, 2.0, 9)
    assert torch.equal(degraded[:, :, :4, 4:], everywhere[:, :, :4, 4:])
    assert not torch.equal(degraded, x0)


def test_autocast_changes_nothing() -> None:
    """It is for the network; in bfloat16 a blur would add noise of its own to the second pass."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 4, 16, 16, generator=generator)
    query, key = torch.randn(2, 1, 2, 64, 8, generator=generator)
    expected = maths.gaussian_blur(picture, 2.0, 9), maths.attention_received(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = maths.gaussian_blur(picture, 2.0, 9), maths.attention_received(query, key)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_blur_can_be_differentiated_after_a_run_in_inference_mode() -> None:
    with torch.inference_mode():
        maths.gaussian_blur(torch.randn(1, 1, 11, 7), 1.3, 5)
    image = torch.randn(1, 1, 11, 7, requires_grad=True)
    maths.gaussian_blur(image, 1.3, 5).sum().backward()
    assert image.grad is not None
