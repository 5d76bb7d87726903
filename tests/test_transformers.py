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
    "Z-Image": "layers.1.attention",
    "Lumina 2": "layers.1.attn",
    "CogView 4": "transformer_blocks.1.attn1",
    "FLUX.2": "single_transformer_blocks.1.attn",
    "HiDream": "single_stream_blocks.1.block.attn1",
}
NEGATED = ("Z-Image", "Lumina 2", "HiDream")
"""Their pipelines give the negative of the prediction to the scheduler."""


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
        is_list = args and isinstance(args[0], list)
        names = ("x", "t", "cap_feats") if is_list else ("hidden_states", "timestep")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        if is_list:
            call["hidden_states"] = torch.cat(call["x"], dim=1).transpose(0, 1)
        calls.append(call)

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
    """Cut the tensors and lists of a call, one level deep."""
    cut = {}
    for name, value in call.items():
        is_batch = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
        cut[name] = value[rows] if is_batch and len(value) == batch else value
        if name == "encoder_hidden_states_llama3":  # behind an axis of layers
            cut[name] = value[:, rows]
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


def turned(x: Tensor, rotary: Any) -> Tensor:
    """Rotate by what each row has of its own, complex, or the halves of channels by (cos, sin)."""
    if isinstance(rotary, tuple):
        cos, sin = (side[None, :, None].double() for side in rotary)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotary[:, :, None].to(pairs.dtype)).flatten(-2)


def z_image_sides(layer: Any, seen: dict[str, Any]) -> list[Tensor]:
    """Queries, keys and values, (batch, tokens, heads, channels), of Z-Image and Lumina 2."""
    found = []
    for which in "qkv":
        heads = getattr(layer, f"to_{which}")(seen["hidden_states"]).unflatten(-1, (-1, 16))
        norm = getattr(layer, f"norm_{which}", None)
        heads = (heads if norm is None else norm(heads)).double()
        rotary = seen["freqs_cis"] if "freqs_cis" in seen else seen["image_rotary_emb"]
        heads = heads if which == "v" else turned(heads, rotary)
        found.append(heads.repeat_interleave(layer.heads // heads.shape[2], dim=2))
    return found


def cogview_4_sides(layer: Any, seen: dict[str, Any]) -> list[Tensor]:
    found = []
    words = seen["encoder_hidden_states"].shape[1]
    states = torch.cat([seen["encoder_hidden_states"], seen["hidden_states"]], dim=1)
    for which in "qkv":
        heads = getattr(layer, f"to_{which}")(states).unflatten(-1, (layer.heads, -1))
        norm = getattr(layer, f"norm_{which}", None)
        heads = (heads if norm is None else norm(heads)).double()
        picture = heads[:, words:]
        picture = picture if which == "v" else turned(picture, seen["image_rotary_emb"])
        found.append(torch.cat([heads[:, :words], picture], dim=1))
    return found


def flux_2_sides(layer: Any, seen: dict[str, Any]) -> list[Tensor]:
    projected = layer.to_qkv_mlp_proj(seen["hidden_states"])[..., : 3 * layer.inner_dim]
    q, k, v = (each.unflatten(-1, (layer.heads, -1)) for each in projected.chunk(3, dim=-1))
    q, k = (norm(x).double() for norm, x in ((layer.norm_q, q), (layer.norm_k, k)))
    return [*(rotated(x, seen["image_rotary_emb"]) for x in (q, k)), v.double()]


def hidream_sides(layer: Any, seen: dict[str, Any]) -> list[Tensor]:
    states, matrices = seen["hidden_states"], seen["image_rotary_emb"].double()
    found = []
    for which, norm in (("q", layer.q_rms_norm), ("k", layer.k_rms_norm), ("v", None)):
        projected = getattr(layer, f"to_{which}")(states)
        heads = (projected if norm is None else norm(projected)).unflatten(-1, (layer.heads, -1))
        heads = heads.double()
        if which == "k":  # the tokens that fill a picture up to a square have no key
            heads = heads * seen["hidden_states_masks"][:, :, None, None]
        if norm is not None:
            pairs = heads.unflatten(-1, (-1, 2, 1))
            heads = (matrices @ pairs).flatten(-3)
        found.append(heads)
    return found


SIDES = {
    "Z-Image": z_image_sides,
    "Lumina 2": z_image_sides,
    "CogView 4": cogview_4_sides,
    "FLUX.2": flux_2_sides,
    "HiDream": hidream_sides,
}


def starts(name: str, call: dict[str, Any], tokens: int) -> list[int]:
    """Where the picture begins in each row of so many tokens of text and picture."""
    count, batch = GRID[0] * GRID[1], len(call["hidden_states"])
    if name == "Lumina 2":
        return call["encoder_attention_mask"].sum(1).tolist()
    is_first = name in ("Stable Diffusion 3.5", "Z-Image", "HiDream")
    return [0 if is_first else tokens - count] * batch


def picture_attention(name: str, layer: Any, seen: dict[str, Any], call: dict[str, Any]) -> Tensor:
    """What each of the picture's tokens receives from the others, mean 1, (batch, tokens)."""
    sides = SIDES[name](layer, seen)[:2] if name in SIDES else both_sides(name, layer, seen)
    scores = torch.einsum("bqhd,bkhd->bhqk", *sides) / sides[0].shape[-1] ** 0.5
    mask = attention_bias(name, call, seen)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).nan_to_num().mean(1)
    tokens = GRID[0] * GRID[1]
    rows = zip(weights, starts(name, call, scores.shape[-1]), strict=True)
    received = torch.stack([row[a : a + tokens, a : a + tokens].sum(0) for row, a in rows])
    return received / received.mean(1, keepdim=True)


def both_sides(name: str, layer: Any, seen: dict[str, Any]) -> list[Tensor]:
    """Queries and keys, (batch, tokens, heads, channels)."""
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
    return sides


def attention_bias(name: str, call: dict[str, Any], seen: dict[str, Any]) -> Tensor | None:
    """Where attention may look, (batch, 1, 1 or queries, keys), for those that mask text."""
    if name in ("Z-Image", "Lumina 2"):
        mask = seen["attention_mask"]
        return None if mask is None else mask[:, None, None].bool()
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
        second = "hidden_states_masks" if self.name == "HiDream" else "encoder_hidden_states"
        names = ("hidden_states", second)
        self.seen = {**dict(zip(names, args, strict=False)), **kwargs}

    def output(self, call: dict[str, Any], x: Tensor) -> Tensor:
        """Predict from latents, both as the call holds them; without a learned variance."""
        if "x" in call:
            listed = {key: value for key, value in call.items() if key != "hidden_states"}
            whole = self.transformer(**{**listed, "x": list(x.float()[:, :, None])})[0]
            return -torch.cat(whole, dim=1).transpose(0, 1)
        whole = self.transformer(**{**call, "hidden_states": x.float()})[0][:, : x.shape[1]]
        return -whole if self.name in NEGATED else whole

    def term(self, step: Step, call: dict[str, Any], scale: float, sigma: float) -> Tensor:
        """The guidance term, in the units and form of the output."""
        tokens = call["hidden_states"]
        x, level = unpacked(tokens).double(), step.level
        assert level is not None
        x0 = clean(step, x, unpacked(self.output(call, tokens)).double())
        received = picture_attention(self.name, self.layer, self.seen, call)
        masked = reference.nearest((received > 1).unflatten(1, GRID), *LATENTS)[:, None].double()
        degraded_x0 = masked * reference.blur(x0, sigma=sigma) + (1 - masked) * x0
        degraded = (x + level.alpha * (degraded_x0 - x0)).float()
        second = unpacked(self.output(call, packed(degraded, tokens))).double()
        second_x0 = clean(step, degraded.double(), second)
        return packed(scale * change_of_output(step, degraded_x0 - second_x0), tokens)


def branches(name: str, step: Step) -> tuple[dict[str, Any], dict[str, Any]]:
    """The unconditional and the conditional call, or the only one twice."""
    calls, rows = first_passes(step), len(step.latents)
    batch = len(calls[0]["hidden_states"])
    if batch == 2 * rows:
        first, second = (rows_of(calls[0], slice(n, n + rows), batch) for n in (0, rows))
        return (second, first) if name == "Z-Image" else (first, second)
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
    # Older versions of diffusers end Z-Image without noise, where x0 tells nothing of the output.
    noisy = [step for step in steps if step.level is not None and step.level.sigma > 0]
    assert len(noisy) >= 2
    for step in noisy:
        uncond, cond = branches(name, step)
        u = plain.output(uncond, uncond["hidden_states"]).double()
        c = plain.output(cond, cond["hidden_states"]).double()
        term = plain.term(step, uncond if branch == "uncond" else cond, 1.5, 2.0)
        expected = u + cfg * (c - u) + term
        if name in ("Qwen-Image", "Lumina 2") and cfg > 1:  # it keeps the conditional one's length
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
