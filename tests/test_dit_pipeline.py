"""DiT: guidance in diffusers' own pipeline, and the original's classifier-free guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from recordings import difference, network
from self_attention_guidance import BlurGuidance, DiTSAGPipeline, SelfAttentionGuidance
from self_attention_guidance.maths import degrade
from self_attention_guidance.models.originals import OriginalDiTModel, dit_scheduler
from tiny import seeded, tiny_vae

NULL = 10
GUIDANCE = SelfAttentionGuidance(1.0, blur_sigma=2.0)


def attention_received(x: Tensor, t: Tensor, y: Tensor, block: int) -> Tensor:
    """Explicit attention of a block, from the inputs of its query and key layers."""
    layer = network("dit").transformer_blocks[block].attn1
    sides: dict[str, Tensor] = {}
    hooks = [
        side.register_forward_hook(lambda _, args, out, name=name: sides.update({name: out}))
        for name, side in {"q": layer.to_q, "k": layer.to_k}.items()
    ]
    network("dit")(x, t, y)
    for hook in hooks:
        hook.remove()
    q, k = (sides[name].unflatten(-1, (layer.heads, -1)).transpose(1, 2) for name in "qk")
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return weights.mean(1).sum(1)


@pytest.mark.supports("formula", pipeline="DiT")
@pytest.mark.parametrize("branch", ["uncond", "cond"])
@torch.no_grad()
def test_a_guided_output_is_the_formula(branch: str) -> None:
    model, scheduler = network("dit"), dit_scheduler()
    scheduler.set_timesteps(4)
    half, timestep = torch.randn(2, 4, 16, 16), 500
    x, t, y = torch.cat([half, half]), torch.full((4,), timestep), torch.tensor([3, 4, NULL, NULL])
    plain = model(x, t, y).sample
    settings = SelfAttentionGuidance(1.5, blur_sigma=2.0, branch=branch)
    with settings.attach(model, scheduler=scheduler, batch_layout="cond_first") as handle:
        guided = model(x, t, y).sample
    rows = slice(0, 2) if branch == "cond" else slice(2, 4)
    level = scheduler.alphas_cumprod[timestep]
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    eps = plain[rows, :4]
    x0 = (half - sigma * eps) / alpha
    received = attention_received(half, t[:2], y[rows], block=2)
    mask = (received > 1).unflatten(1, (8, 8))
    assert handle.mask is not None
    assert torch.equal(handle.mask, mask)
    x_degraded = alpha * degrade(x0, mask, 2.0, 9) + sigma * eps
    term = eps - model(x_degraded, t[:2], y[rows]).sample[:, :4]
    expected = plain[:, :4] + 1.5 * torch.cat([term, term])
    assert difference(guided[:, :4], expected) < 1e-4 * expected.abs().max()
    assert difference(guided[:, :4], plain[:, :4]) > 1e-2
    assert torch.equal(guided[:, 4:], plain[:, 4:])  # the learned variance


def with_1001_labels() -> OriginalDiTModel:
    """A network whose label of no class is the one that diffusers' pipeline hard-codes."""
    with seeded(0):
        model = OriginalDiTModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            sample_size=16,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def draw(pipe: Any, labels: tuple[int, ...] = (1, 2), **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(label) for label in labels]
    settings = {"num_inference_steps": 3, "output_type": "pt", **arguments}
    images = pipe(class_labels=list(labels), generator=generators, **settings).images
    return torch.as_tensor(images)  # older versions of diffusers return an array


@pytest.mark.supports("runs", pipeline="DiT")
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_diffusers_own_pipeline_is_guided(guidance_scale: float) -> None:
    pipe = DiTPipeline(with_1001_labels(), tiny_vae(), dit_scheduler())
    plain = draw(pipe, guidance_scale=guidance_scale)
    rows: list[int] = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with GUIDANCE.attach(pipe) as handle:
        guided = draw(pipe, guidance_scale=guidance_scale)
    assert handle.steps == 3
    assert rows == [2 if guidance_scale == 1 else 4, 2] * 3
    assert difference(guided, plain) > 1e-3
    assert torch.equal(draw(pipe, guidance_scale=guidance_scale), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_class_is_attach_with_cfg_on_all_channels(guidance_scale: float) -> None:
    pipe = DiTPipeline(with_1001_labels(), tiny_vae(), dit_scheduler())
    ours = DiTSAGPipeline(**pipe.components)
    with SelfAttentionGuidance(0.75).attach(pipe):
        expected = draw(pipe, guidance_scale=guidance_scale)
    found = draw(ours, guidance_scale=guidance_scale, cfg_channels=None)
    assert torch.equal(found, expected)
    by_original = draw(ours, guidance_scale=guidance_scale)
    assert (difference(by_original, expected) > 1e-3) == (guidance_scale > 1)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("sag_scale", [0.0, 1.0])
@torch.no_grad()
def test_cfg_acts_on_the_originals_three_channels(sag_scale: float) -> None:
    model: Any = network("dit")
    pipe = DiTSAGPipeline(model, tiny_vae(), dit_scheduler())
    pipe.guidance = SelfAttentionGuidance(blur_sigma=2.0)
    latents: list[Tensor] = []
    hook = pipe.vae.post_quant_conv.register_forward_pre_hook(
        lambda _, args: latents.append(args[0] * pipe.vae.config.scaling_factor)
    )
    draw(pipe, num_inference_steps=1, guidance_scale=4.0, sag_scale=sag_scale)
    hook.remove()
    scheduler = dit_scheduler()
    scheduler.set_timesteps(1)
    generators = [torch.Generator().manual_seed(label) for label in (1, 2)]
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=generator) for generator in generators])
    pair, t = torch.cat([x, x]), scheduler.timesteps.expand(4)
    labels = torch.tensor([1, 2, NULL, NULL])
    if sag_scale:
        guidance = SelfAttentionGuidance(sag_scale, blur_sigma=2.0)
        with guidance.attach(model, scheduler=scheduler, batch_layout="cond_first"):
            output = model.forward_with_cfg(pair, t, labels, 4.0)[:2, :4]
    else:
        output = model.forward_with_cfg(pair, t, labels, 4.0)[:2, :4]
    expected = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    assert difference(latents[0], expected) < 1e-4 * expected.abs().max()


@pytest.mark.supports("batch", pipeline="DiT")
def test_a_batch_of_three_equals_three_pictures() -> None:
    pipe = DiTSAGPipeline(network("dit"), tiny_vae(), dit_scheduler())
    together = draw(pipe, (1, 2, 3))
    for row, label in enumerate((1, 2, 3)):
        assert difference(draw(pipe, (label,)), together[row : row + 1]) < 1e-4
    assert difference(draw(pipe, (3, 2, 1)).flip(0), together) < 1e-4


def test_other_schedulers_and_blur_guidance() -> None:
    pipe = DiTSAGPipeline(network("dit"), tiny_vae(), dit_scheduler())
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    plain = draw(pipe, sag_scale=0)
    assert difference(draw(pipe, sag_scale=1.0), plain) > 1e-3
    pipe.guidance = BlurGuidance(blur_sigma=2.0)
    assert difference(draw(pipe, sag_scale=1.0), plain) > 1e-3
    assert torch.equal(draw(pipe, sag_scale=0), plain)


def test_the_default_layer_is_the_middle_block() -> None:
    scheduler = dit_scheduler()
    assert GUIDANCE.reads(network("dit")) == ("transformer_blocks.2.attn1",)
    with pytest.raises(ValueError, match="is not a self-attention layer"):
        SelfAttentionGuidance(layer="transformer_blocks.middle.attn2").attach(
            network("dit"), scheduler=scheduler
        )
    assert not network("dit")._forward_hooks


def test_scales_without_sense_are_refused() -> None:
    pipe = DiTSAGPipeline(network("dit"), tiny_vae(), dit_scheduler())
    with pytest.raises(ValueError, match="sag_scale=nan"):
        draw(pipe, sag_scale=float("nan"))
