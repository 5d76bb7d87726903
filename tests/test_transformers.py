"""Diffusion transformers in diffusers' own pipelines: the formula, batches, scale 0.

The reference sees what the pipeline gave to its transformer and to its scheduler at every step. It
shares no code with the library: explicit attention from the layer's own projections, norms and
rotary embeddings, its own mask, blur, noise levels, second pass and classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from self_attention_guidance import SelfAttentionGuidance
from tiny_transformers import SIZE, TRANSFORMERS, draw

NAMES = list(TRANSFORMERS)
LATENTS = (SIZE["height"] // 8, SIZE["width"] // 8)
GRID = (LATENTS[0] // 2, LATENTS[1] // 2)
LAYERS = {
    "PixArt-Sigma": "transformer_blocks.1.attn1",
    "Stable Diffusion 3.5": "transformer_blocks.1.attn",
    "Hunyuan-DiT": "blocks.2.attn1",
    "AuraFlow": "single_transformer_blocks.1.attn",
    "Flux": "single_transformer_blocks.1.attn",
    "Chroma": "single_transformer_blocks.1.attn",
    "Qwen-Image": "transformer_blocks.1.attn",
}


@dataclass
class Step:
    """What a pipeline did at one step: its calls of the transformer, and the scheduler's input."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    kind: str = ""
    level: reference.Level | None = None


@contextmanager
def recorded(pipe: Any) -> Iterator[list[Step]]:
    """Note every step of a pipeline inside the `with` statement."""
    scheduler, steps, calls = pipe.scheduler, [], []
    original = scheduler.step

    def see_call(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "timestep")
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})

    def see_step(output: Tensor, t: Tensor, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind, level = level_of(scheduler, t, len(steps))
        steps.append(Step(list(calls), output.clone(), latents.clone(), kind, level))
        calls.clear()
        return original(output, t, latents, *args, **kwargs)

    hook = pipe.transformer.register_forward_pre_hook(see_call, with_kwargs=True)
    scheduler.step = see_step
    yield steps
    del scheduler.step
    hook.remove()


def level_of(scheduler: Any, t: Tensor, index: int) -> tuple[str, reference.Level]:
    """The kind of prediction and the noise level of a step."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        sigma = float(scheduler.sigmas[index])
        return kind, reference.Level(1 - sigma, sigma)
    return kind, reference.noise_level(scheduler, index, 0, t)


def first_passes(step: Step) -> list[dict[str, Any]]:
    """The calls that the pipeline itself made."""
    rows = len(step.latents)
    return [c for c in step.calls if torch.equal(c["hidden_states"][:rows], step.latents)]


def rows_of(call: dict[str, Any], rows: slice, batch: int) -> dict[str, Any]:
    """Cut the tensors of a call, one level deep."""
    cut = {}
    for name, value in call.items():
        is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        cut[name] = value[rows] if is_batch else value
    return cut


def rotated(x: Tensor, rotary: Any) -> Tensor:
    """Rotate pairs of neighbouring channels of (batch, tokens, heads, channels)."""
    if isinstance(rotary, tuple):
        cos, sin = (side[None, :, None].double() for side in rotary)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + turned * sin
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotary[None, :, None].to(pairs.dtype)).flatten(-2)


def side(layer: Any, states: Tensor, text: Tensor | None, which: str) -> tuple[Tensor, Any]:
    """Queries or keys of the picture (or of all tokens) and of the text, after their norms."""

    def project(projection: str, norm: str, x: Tensor) -> Tensor:
        module = getattr(layer, norm, None)
        heads = getattr(layer, projection)(x).unflatten(-1, (layer.heads, -1))
        return (heads if module is None else module(heads)).double()

    own = project(f"to_{which}", f"norm_{which}", states)
    if text is None:
        return own, None
    return own, project(f"add_{which}_proj", f"norm_added_{which}", text)


def picture_attention(name: str, layer: Any, seen: dict[str, Any], mask: Any) -> Tensor:
    """What each of the picture's tokens receives from the others, mean 1, (batch, tokens)."""
    text, rotary = seen.get("encoder_hidden_states"), seen.get("image_rotary_emb")
    sides = []
    for which in "qk":
        picture, words = side(layer, seen["hidden_states"], text, which)
        if name == "Qwen-Image":
            picture, words = rotated(picture, rotary[0]), rotated(words, rotary[1])
        if words is not None:
            both = [picture, words] if name == "Stable Diffusion 3.5" else [words, picture]
            picture = torch.cat(both, dim=1)
        elif rotary is not None:
            picture = rotated(picture, rotary)
        sides.append(picture)
    scores = torch.einsum("bqhd,bkhd->bhqk", *sides) / sides[0].shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).nan_to_num()
    tokens, total = GRID[0] * GRID[1], scores.shape[-1]
    first = 0 if name == "Stable Diffusion 3.5" else total - tokens
    inside = slice(first, first + tokens)
    received = weights[:, :, inside, inside].mean(1).sum(1)
    return received / received.mean(1, keepdim=True)


def attention_bias(name: str, call: dict[str, Any]) -> Tensor | None:
    """Where attention may look, (batch, 1, 1 or queries, keys), for those that mask text."""
    if name == "Qwen-Image":
        words = call["encoder_hidden_states_mask"].bool()
        picture = torch.ones(len(words), GRID[0] * GRID[1], dtype=torch.bool)
        return torch.cat([words, picture], dim=1)[:, None, None]
    if name == "Chroma":
        mask = call["attention_mask"].bool()
        return mask[:, None, None, :] & mask[:, None, :, None]
    return None


def unpacked(tokens: Tensor) -> Tensor:
    """Latents (batch, channels, height, width) of tokens that hold 2 x 2 latent pixels each."""
    if tokens.ndim == 4:
        return tokens
    rows, columns = GRID
    squares = tokens.reshape(len(tokens), rows, columns, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * rows, 2 * columns)


def packed(latents: Tensor, like: Tensor) -> Tensor:
    """The reverse, where `like` is packed."""
    if like.ndim == 4:
        return latents
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)


def clean(step: Step, x: Tensor, u: Tensor) -> Tensor:
    level = step.level
    assert level is not None
    if step.kind == "flow_prediction":
        return x - level.sigma * u
    return reference.clean_from_output(step.kind, level, x, u)


def change_of_output(step: Step, change: Tensor) -> Tensor:
    """By how much an output differs whose x0 differs by `change`."""
    level = step.level
    assert level is not None
    per_noise = step.kind == "epsilon"
    return -change * level.alpha / level.sigma if per_noise else -change / level.sigma


class Reference:
    """A pipeline's transformer without guidance."""

    def __init__(self, name: str, transformer: Any) -> None:
        self.name, self.transformer = name, transformer
        self.layer = transformer.get_submodule(LAYERS[name])
        self.layer.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "encoder_hidden_states")
        self.seen = {**dict(zip(names, args, strict=False)), **kwargs}

    def output(self, call: dict[str, Any], x: Tensor) -> Tensor:
        """Predict from latents, both as the call holds them; without a learned variance."""
        whole = self.transformer(**{**call, "hidden_states": x.float()})[0]
        return whole[:, : x.shape[1]]

    def term(self, step: Step, call: dict[str, Any], scale: float, sigma: float) -> Tensor:
        """The guidance term, in the units and form of the output."""
        tokens = call["hidden_states"]
        x, level = unpacked(tokens).double(), step.level
        assert level is not None
        x0 = clean(step, x, unpacked(self.output(call, tokens)).double())
        mask = attention_bias(self.name, call)
        received = picture_attention(self.name, self.layer, self.seen, mask)
        masked = reference.nearest((received > 1).unflatten(1, GRID), *LATENTS)[:, None].double()
        degraded_x0 = masked * reference.blur(x0, sigma=sigma) + (1 - masked) * x0
        degraded = (x + level.alpha * (degraded_x0 - x0)).float()
        second = unpacked(self.output(call, packed(degraded, tokens))).double()
        second_x0 = clean(step, degraded.double(), second)
        return packed(scale * change_of_output(step, degraded_x0 - second_x0), tokens)


def branches(step: Step) -> tuple[dict[str, Any], dict[str, Any]]:
    """The unconditional and the conditional call, or the only one twice."""
    calls, rows = first_passes(step), len(step.latents)
    batch = len(calls[0]["hidden_states"])
    if batch == 2 * rows:
        return tuple(rows_of(calls[0], half, batch) for half in (slice(rows), slice(rows, batch)))
    return calls[-1], calls[0]


@pytest.mark.supports("formula")
@pytest.mark.parametrize(("cfg", "branch"), [(1.0, "uncond"), (3.0, "uncond"), (3.0, "cond")])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_guided_predictions_are_the_formula(name: str, cfg: float, branch: Any) -> None:
    pipe = TRANSFORMERS[name].make()
    guidance = SelfAttentionGuidance(1.5, blur_sigma=2.0, branch=branch)
    with recorded(pipe) as steps, guidance.attach(pipe) as handle:
        draw(name, pipe, (3, 4), cfg)
    assert handle.mask is not None
    assert 0.1 < handle.mask.double().mean() < 0.9
    plain = Reference(name, pipe.transformer)
    assert len(steps) == 3
    for step in steps:
        uncond, cond = branches(step)
        u = plain.output(uncond, uncond["hidden_states"]).double()
        c = plain.output(cond, cond["hidden_states"]).double()
        term = plain.term(step, uncond if branch == "uncond" else cond, 1.5, 2.0)
        expected = u + cfg * (c - u) + term
        if name == "Qwen-Image" and cfg > 1:  # it keeps the length of the conditional prediction
            length = (c + term).norm(dim=-1, keepdim=True)
            expected = expected * length / expected.norm(dim=-1, keepdim=True)
        assert term.abs().max() > 1e-2 * expected.abs().max()
        assert (step.output - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.supports("runs")
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_scale_zero_and_removal_are_bit_equal(name: str, cfg: float) -> None:
    pipe = TRANSFORMERS[name].make()
    plain = draw(name, pipe, (3,), cfg)
    with SelfAttentionGuidance(0).attach(pipe):
        assert torch.equal(draw(name, pipe, (3,), cfg), plain)
    with SelfAttentionGuidance(1.0).attach(pipe):
        guided = draw(name, pipe, (3,), cfg)
        assert (guided - plain).abs().max() > 1e-2 * plain.abs().max()
        assert torch.equal(draw(name, pipe, (3,), cfg), guided)
    assert torch.equal(draw(name, pipe, (3,), cfg), plain)


@pytest.mark.supports("batch")
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_three_equals_three_pictures(name: str, cfg: float) -> None:
    pipe = TRANSFORMERS[name].make()
    if batch_difference(name, pipe, cfg) > 1e-3:
        pytest.skip("without guidance, too, this version of diffusers mixes the rows of a batch")
    with SelfAttentionGuidance(1.0).attach(pipe):
        assert batch_difference(name, pipe, cfg) < 1e-4


def batch_difference(name: str, pipe: Any, cfg: float) -> float:
    """How far, relative to the largest value, pictures of a batch are from those drawn alone."""
    together = draw(name, pipe, (3, 4, 5), cfg)
    alone = torch.cat([draw(name, pipe, (seed,), cfg) for seed in (3, 4, 5)])
    return float((alone - together).abs().max() / together.abs().max())
