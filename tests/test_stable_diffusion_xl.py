"""Stable Diffusion XL: its own class, `attach`, and the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance, StableDiffusionXLSAGPipeline
from self_attention_guidance.maths import degrade
from tiny import TEXT_WIDTH, tiny_scheduler
from tiny_xl import draw_kolors, kolors_pipeline, xl_pipeline, xl_unet


@pytest.fixture
def pipe() -> StableDiffusionXLPipeline:
    return xl_pipeline(StableDiffusionXLPipeline)


def draw(pipe: Any, seeds: tuple[int, ...] = (0,), **arguments: Any) -> Tensor:
    return pipe(
        ["red"] * len(seeds),
        height=64,
        width=80,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.supports("runs", pipeline="Stable Diffusion XL")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_class_is_attach_and_scale_zero_is_bit_equal(
    pipe: StableDiffusionXLPipeline, guidance_scale: float
) -> None:
    ours = StableDiffusionXLSAGPipeline(**pipe.components, add_watermarker=False)
    ours.set_progress_bar_config(disable=True)
    plain = draw(pipe, guidance_scale=guidance_scale)
    assert torch.equal(draw(ours, guidance_scale=guidance_scale, sag_scale=0), plain)
    with SelfAttentionGuidance(1.5, blur_sigma=2.0).attach(pipe) as handle:
        expected = draw(pipe, guidance_scale=guidance_scale)
    assert handle.steps == 3
    assert (expected - plain).abs().max() > 1e-2
    ours.guidance = SelfAttentionGuidance(blur_sigma=2.0)
    assert torch.equal(draw(ours, guidance_scale=guidance_scale, sag_scale=1.5), expected)
    assert torch.equal(draw(pipe, guidance_scale=guidance_scale), plain)
    with pytest.raises(ValueError, match="sag_scale=inf"):
        draw(ours, sag_scale=float("inf"))


@pytest.mark.supports("batch", pipeline="Stable Diffusion XL")
def test_a_batch_of_three_equals_three_pictures(pipe: StableDiffusionXLPipeline) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe):
        together = draw(pipe, (3, 4, 5))
        for row, seed in enumerate((3, 4, 5)):
            alone = draw(pipe, (seed,))
            assert (alone - together[row : row + 1]).abs().max() < 1e-4 * together.abs().max()


@pytest.mark.supports("runs", "batch", pipeline="Kolors")
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_kolors_is_guided_leaves_no_trace_and_keeps_rows_apart(cfg: float) -> None:
    pipe = kolors_pipeline()
    plain = draw_kolors(pipe, (3, 4), cfg)
    with SelfAttentionGuidance(0).attach(pipe):
        assert torch.equal(draw_kolors(pipe, (3, 4), cfg), plain)
    with SelfAttentionGuidance(1.0).attach(pipe):
        guided = draw_kolors(pipe, (3, 4), cfg)
        assert (guided - plain).abs().max() > 1e-2 * plain.abs().max()
        alone = draw_kolors(pipe, (4,), cfg)
        assert (alone - guided[1:]).abs().max() < 1e-4 * guided.abs().max()
    assert torch.equal(draw_kolors(pipe, (3, 4), cfg), plain)


NETWORKS = [
    pytest.param(network, width, marks=pytest.mark.supports("formula", pipeline=name), id=name)
    for name, network, width in (
        ("Stable Diffusion XL", xl_unet, 2 * TEXT_WIDTH),
        ("Kolors", lambda: kolors_pipeline().unet, TEXT_WIDTH),
    )
]


@pytest.mark.parametrize(("network", "width"), NETWORKS)
@pytest.mark.parametrize("branch", ["uncond", "cond"])
@torch.no_grad()
def test_a_guided_output_is_the_formula(network: Any, width: int, branch: Any) -> None:
    unet, scheduler = network(), tiny_scheduler()
    scheduler.set_timesteps(4)
    half, timestep = torch.randn(2, 4, 8, 10), 501
    x = torch.cat([half, half])
    texts = torch.randn(4, 7, width)
    added = {"text_embeds": torch.randn(4, TEXT_WIDTH), "time_ids": torch.rand(4, 6) * 100}
    rows = slice(0, 2) if branch == "uncond" else slice(2, 4)

    def predict(x: Tensor, rows: slice) -> Tensor:
        conditions = {name: value[rows] for name, value in added.items()}
        return unet(x, timestep, texts[rows], added_cond_kwargs=conditions).sample

    sides: dict[str, Tensor] = {}
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    hooks = [
        side.register_forward_hook(lambda _, args, out, name=name: sides.update({name: out}))
        for name, side in {"q": layer.to_q, "k": layer.to_k}.items()
    ]
    eps = predict(half, rows)
    for hook in hooks:
        hook.remove()
    q, k = (sides[name].unflatten(-1, (layer.heads, -1)).transpose(1, 2) for name in "qk")
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    mask = (weights.mean(1).sum(1) > 1).unflatten(1, (4, 5))
    level = scheduler.alphas_cumprod[timestep]
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    x0 = (half - sigma * eps) / alpha
    x_degraded = alpha * degrade(x0, mask, 1.0, 9) + sigma * eps
    term = eps - predict(x_degraded, rows)
    expected = predict(x, slice(0, 4)) + 2.0 * torch.cat([term, term])

    settings = SelfAttentionGuidance(2.0, branch=branch)
    with settings.attach(unet, scheduler=scheduler, batch_layout="uncond_first") as handle:
        guided = unet(x, timestep, texts, added_cond_kwargs=added).sample
    assert handle.mask is not None
    assert torch.equal(handle.mask, mask)
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()
