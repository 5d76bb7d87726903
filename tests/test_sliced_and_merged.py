"""Kernels that are called in slices, merged tokens and a third call a step: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from family import KINDS
from self_attention_guidance import (
    Guidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SmoothedEnergyGuidance,
)
from test_guidance import difference, draw
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

KERNEL: Any = F.scaled_dot_product_attention
SAG, PAG = SelfAttentionGuidance(2.0), PerturbedAttentionGuidance(2.0)
SEG = SmoothedEnergyGuidance(2.0)


def cut(mask: Tensor | None, axis: int, part: slice) -> Tensor | None:
    """A part of a mask that broadcasts to (batch, heads, queries, keys)."""
    if mask is None or (mask := mask[(None,) * (4 - mask.ndim)]).shape[axis] == 1:
        return mask
    return mask[(slice(None),) * axis + (part,)]


def in_slices(axis: int) -> Callable[..., Tensor]:
    """A wrapper of the kernel that halves the rows, heads or queries, to save memory."""

    def wrapper(query: Any, key: Any, value: Any, attn_mask: Any = None, **others: Any) -> Tensor:
        half = (query.shape[axis] + 1) // 2
        found = []
        for part in (slice(0, half), slice(half, query.shape[axis])):
            where = (slice(None),) * axis + (part,)
            if query[where].numel():
                own = (query[where], *(each[where] if axis < 2 else each for each in (key, value)))
                found.append(KERNEL(*own, attn_mask=cut(attn_mask, axis, part), **others))
        return torch.cat(found, axis)

    return wrapper


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["rows", "heads", "queries"])
@pytest.mark.parametrize("guidance", [SAG, PAG, SEG], ids=lambda guidance: guidance.method)
@pytest.mark.parametrize("name", ["Stable Diffusion", "Lumina 2"])
def test_a_kernel_in_slices_is_right_or_named(
    name: str, guidance: Guidance, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]

    def drawn() -> Tensor:
        pipe = kind.make()
        with guidance.attach(pipe):
            return kind.draw(pipe, (3, 4))

    right = drawn()
    monkeypatch.setattr(F, "scaled_dot_product_attention", in_slices(axis))
    has_own_places = name == "Lumina 2" and guidance is not SAG
    if (axis == 0 and not has_own_places) or (axis == 1 and guidance is not SAG):
        assert difference(drawn(), right) < 1e-4
    else:
        with pytest.raises(RuntimeError, match=r"was replaced by .*in_slices.*wrapper; undo that"):
            drawn()


def test_a_layer_of_several_that_is_not_weakened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the large layers of a network are sliced."""

    def wrapper(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> Tensor:
        is_large = query.shape[-2] == key.shape[-2] >= 64
        return (in_slices(2) if is_large else KERNEL)(query, key, value, *others, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrapper)
    pipe = tiny_pipeline(StableDiffusionPipeline)
    guidance = PerturbedAttentionGuidance(2.0, layers=["mid", "down"])
    message = "no attention was weakened at 'down_blocks.0.*wrapper; undo that"
    with guidance.attach(pipe), pytest.raises(RuntimeError, match=message):
        draw(pipe)


class Downsampled(AttnProcessor2_0):
    """Attends to the means of four tokens each (as ToDo does)."""

    def __call__(self, attn: Any, hidden_states: Any, *_: Any, **__: Any) -> Tensor:
        few = hidden_states.unflatten(1, (-1, 4)).mean(2)
        return super().__call__(attn, hidden_states, encoder_hidden_states=few)


def test_a_layer_that_attends_to_fewer_tokens_is_named() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    pipe.unet.get_submodule(layer).set_processor(Downsampled())
    guidance = PerturbedAttentionGuidance(2.0, layers=["mid", "down"])
    message = f"no attention was weakened at '{layer}': .*Downsampled"
    with guidance.attach(pipe), pytest.raises(RuntimeError, match=message):
        draw(pipe)


class Merging:
    """Merges pairs of the picture's first tokens before another processor, and copies them back."""

    def __init__(self, inner: Any, pairs: int, words: int) -> None:
        self.inner, self.pairs, self.words = inner, pairs, words

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        words = self.words if encoder_hidden_states is None else 0
        text, first, rest = hidden_states.tensor_split((words, words + 2 * self.pairs), dim=1)
        few = torch.cat([text, first[:, ::2], rest], dim=1)
        others: dict[str, Any] = {}
        if image_rotary_emb is not None:
            parts = (each.tensor_split((6, 6 + 2 * self.pairs)) for each in image_rotary_emb)
            others["image_rotary_emb"] = tuple(torch.cat([a, b[::2], c]) for a, b, c in parts)
        out = self.inner(attn, few, encoder_hidden_states=encoder_hidden_states, **others)
        picture = out[0] if isinstance(out, tuple) else out
        text, first, rest = picture.tensor_split((words, words + self.pairs), dim=1)
        picture = torch.cat([text, first.repeat_interleave(2, 1), rest], dim=1)
        return (picture, *out[1:]) if isinstance(out, tuple) else picture


@pytest.mark.parametrize("pairs", [2, 6])
@pytest.mark.parametrize("guidance", [SAG, PAG, SEG], ids=lambda guidance: guidance.method)
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("Flux", "single_transformer_blocks.1.attn"),
        ("Stable Diffusion 3.5", "transformer_blocks.1.attn"),
    ],
)
def test_merged_tokens_beside_text_are_refused(
    name: str, layer: str, guidance: Any, pairs: int
) -> None:
    """Six pairs leave as many positions as the picture has tokens, text included."""
    kind = KINDS[name]
    pipe = kind.make()
    attention = pipe.transformer.get_submodule(layer)
    attention.set_processor(Merging(attention.processor, pairs, words=6))
    kind.draw(pipe, (3,))  # it draws without guidance
    where = {"layer": layer} if guidance is SAG else {"layers": layer}
    guidance = type(guidance)(2.0, **where)
    with guidance.attach(pipe), pytest.raises(ValueError, match="code that merges or drops tokens"):
        kind.draw(pipe, (3,))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [SAG, PAG], ids=lambda guidance: guidance.method)
@pytest.mark.parametrize("layout", ["uncond_call_first", "cond_call_first"])
def test_a_third_condition_is_refused(layout: Any, guidance: Guidance) -> None:
    net, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(4)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(3, 1, 77, 32)
    attached = guidance.attach(net, scheduler=scheduler, batch_layout=layout)
    with attached, pytest.raises(RuntimeError, match="called a third time at one step"):
        outputs: list[Tensor] = []  # a loop holds them until it combines them
        for text in texts:
            outputs.append(net(x, scheduler.timesteps[0], text).sample)
