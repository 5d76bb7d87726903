"""The guider of modular pipelines: equal to `attach`, loud, and it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    modular_pipelines,
)
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance, SelfAttentionGuider
from test_stable_diffusion_xl import draw as draw_xl
from test_stable_diffusion_xl import pipe as pipe
from tiny import tiny_scheduler
from tiny_transformers import SIZE, draw, pooled_embeddings, stable_diffusion_3

needs_3 = pytest.mark.skipif(
    not hasattr(modular_pipelines, "StableDiffusion3ModularPipeline"),
    reason="this version of diffusers has no modular Stable Diffusion 3",
)
SETTINGS: dict[str, Any] = {"blur_sigma": 2.0, "threshold": 1.1}
PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")


def modular_xl(pipe: StableDiffusionXLPipeline, guider: Any) -> Any:
    """A modular pipeline of the same parts."""
    made = modular_pipelines.StableDiffusionXLAutoBlocks().init_pipeline()
    parts = {name: pipe.components[name] for name in PARTS}
    made.update_components(**parts, scheduler=pipe.scheduler, guider=guider)
    made.loader_progress_bar = False
    return made


def draw_modular(made: Any, seeds: tuple[int, ...] = (0,), **arguments: Any) -> Tensor:
    return made(
        prompt=["red"] * len(seeds),
        height=64,
        width=80,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output="latents",
        **arguments,
    )


@pytest.mark.supports("runs", "formula", pipeline="Stable Diffusion XL, modular")
@pytest.mark.parametrize("branch", ["uncond", "cond"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_xl_equals_attach(pipe: Any, guidance_scale: float, branch: Any) -> None:
    settings = {**SETTINGS, "branch": branch}
    with SelfAttentionGuidance(1.5, **settings).attach(pipe):
        expected = draw_xl(pipe, (3, 4), guidance_scale=guidance_scale)
    plain = draw_xl(pipe, (3, 4), guidance_scale=guidance_scale)
    guider = SelfAttentionGuider(guidance_scale=guidance_scale, sag_scale=1.5, **settings)
    guided = draw_modular(modular_xl(pipe, guider), (3, 4))
    assert (expected - plain).abs().max() > 1e-2
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()
    assert guider.guidance_handle is not None
    assert guider.guidance_handle.mask is not None
    assert torch.equal(draw_xl(pipe, (3, 4), guidance_scale=guidance_scale), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_guider_holds_as_attach_does(pipe: Any, guidance_scale: float) -> None:
    settings: dict[str, Any] = {"every": 2, "stop": 0.6}
    with SelfAttentionGuidance(1.5, **settings).attach(pipe) as handle:
        expected = draw_xl(pipe, (3, 4), guidance_scale=guidance_scale)
    guider = SelfAttentionGuider(
        guidance_scale=guidance_scale, sag_scale=1.5, every=2, sag_stop=settings["stop"]
    )
    guided = draw_modular(modular_xl(pipe, guider), (3, 4))
    assert handle.steps == 1
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()


def draw_3(pipe: StableDiffusion3Pipeline, guider: Any) -> Tensor:
    blocks = modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3
    made = blocks.StableDiffusion3AutoCoreDenoiseStep().init_pipeline()
    made.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler, guider=guider)
    embeddings = pooled_embeddings([3, 4], "") | pooled_embeddings([53, 54], "negative_")
    return made(
        **embeddings,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output="latents",
        **SIZE,
    )


@needs_3
@pytest.mark.supports("runs", "formula", pipeline="Stable Diffusion 3.5, modular")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_stable_diffusion_3_equals_attach(guidance_scale: float) -> None:
    pipe = stable_diffusion_3()
    with SelfAttentionGuidance(1.5, **SETTINGS).attach(pipe):
        expected = draw("Stable Diffusion 3.5", pipe, (3, 4), guidance_scale)
    guider = SelfAttentionGuider(guidance_scale=guidance_scale, sag_scale=1.5, **SETTINGS)
    assert (draw_3(pipe, guider) - expected).abs().max() < 1e-4 * expected.abs().max()


@needs_3
def test_disabling_switches_off_classifier_free_guidance_alone() -> None:
    pipe = stable_diffusion_3()
    with SelfAttentionGuidance(1.5, **SETTINGS).attach(pipe):
        expected = draw("Stable Diffusion 3.5", pipe, (3, 4), 1.0)
    plain = draw("Stable Diffusion 3.5", pipe, (3, 4), 1.0)
    guider = SelfAttentionGuider(guidance_scale=3.0, sag_scale=1.5, **SETTINGS)
    guider.disable()
    assert (draw_3(pipe, guider) - expected).abs().max() < 1e-4 * expected.abs().max()
    guider = SelfAttentionGuider(guidance_scale=3.0, sag_scale=1.5, enabled=False)
    assert (draw_3(pipe, guider) - plain).abs().max() < 1e-4 * plain.abs().max()


def test_only_part_of_the_steps_is_guided(pipe: Any) -> None:
    with SelfAttentionGuidance(1.5, stop=0.5).attach(pipe):
        expected = draw_xl(pipe, guidance_scale=5.0)
    guider = SelfAttentionGuider(guidance_scale=5.0, sag_scale=1.5, sag_stop=0.5)
    guided = draw_modular(modular_xl(pipe, guider))
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()


def test_scale_zero_is_bit_equal_to_no_guidance(pipe: Any) -> None:
    plain = draw_modular(modular_xl(pipe, ClassifierFreeGuidance(5.0)))
    guider = SelfAttentionGuider(5.0, sag_scale=0.0)
    assert torch.equal(draw_modular(modular_xl(pipe, guider)), plain)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
def test_the_scheduler_of_the_pipeline_that_runs_is_followed(pipe: Any, scheduler: Any) -> None:
    pipe.scheduler = tiny_scheduler(scheduler)
    made = modular_xl(pipe, SelfAttentionGuider(5.0, sag_scale=1.5))
    for has_run in (False, True):
        if has_run:
            made.update_components(scheduler=scheduler.from_config(pipe.scheduler.config))
        with SelfAttentionGuidance(1.5).attach(pipe):
            expected = draw_xl(pipe, guidance_scale=5.0)
        assert (draw_modular(made) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_loop_of_ones_own_must_give_the_scheduler(pipe: Any) -> None:
    guider = SelfAttentionGuider(1.0)
    pipe.scheduler.set_timesteps(3)
    guider.set_state(0, 3, pipe.scheduler.timesteps[0])
    guider.prepare_inputs({"x": (torch.zeros(1), None)})
    with pytest.raises(ValueError, match="no modular pipeline runs; set guider"):
        guider.prepare_models(pipe.unet)
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_after_an_exception(pipe: Any, error: type[BaseException]) -> None:
    plain = draw_xl(pipe, guidance_scale=5.0)
    made = modular_xl(pipe, SelfAttentionGuider(guidance_scale=5.0, sag_scale=1.5))
    guided = draw_modular(made)

    def fail(*_: Any) -> None:
        raise error

    hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(error):
        draw_modular(made)
    hook.remove()
    # torch runs no hooks after Ctrl-C: guidance goes with the next call, which it leaves alone
    assert torch.equal(draw_xl(pipe, guidance_scale=5.0), plain)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert torch.equal(draw_modular(made), guided)


def test_settings_are_saved_and_loaded(pipe: Any, tmp_path: Path) -> None:
    guider = SelfAttentionGuider(guidance_scale=4.0, sag_scale=1.5, sag_stop=0.5, **SETTINGS)
    guider.scheduler = pipe.scheduler
    guider.save_pretrained(tmp_path)
    loaded = SelfAttentionGuider.from_pretrained(tmp_path)
    assert loaded.guidance == guider.guidance
    assert loaded.guidance_scale == 4.0
    copy = guider.new(sag_scale=0.5)
    assert copy.scheduler is pipe.scheduler
    assert copy.guidance == SelfAttentionGuidance(0.5, stop=0.5, **SETTINGS)
    with pytest.raises(ValueError, match="blur_kernel_size=4"):
        SelfAttentionGuider(blur_kernel_size=4)
