"""The tensor arithmetic: properties that hold for any input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from self_attention_guidance import maths
from self_attention_guidance.capture import token_grid


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


def test_mask_is_strictly_above_the_threshold() -> None:
    received = torch.tensor([0.5, 1.0, 1.5])
    assert maths.attention_mask(received).tolist() == [False, False, True]
    assert maths.attention_mask(received, 0.4).all()


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


@settings(deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), halvings=st.integers(0, 4))
def test_token_grid_is_found_for_every_size(height: int, width: int, halvings: int) -> None:
    rows, columns = height, width
    for _ in range(halvings):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    assert token_grid(rows * columns, height, width) == (rows, columns)


def test_token_grid_refuses_what_is_no_grid() -> None:
    with pytest.raises(ValueError, match="7 attention tokens do not form a grid over 8 x 8"):
        token_grid(7, 8, 8)
