"""Guidance follows the pipeline that runs, its scheduler and its batch, or refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

PICTURE = Image.new("RGB", (64, 64), "teal")
SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
GUIDANCE = SelfAttentionGuidance(2.0)


def draw(pipe: Any, prompt: str = "red", **arguments: Any) -> Tensor:
    usual = {"num_inference_steps": 5, "height": 64, "width": 64, "output_type": "latent"}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**usual, **arguments}).images


def redraw(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = {"strength": 0.8, "num_inference_steps": 5, "output_type": "latent"}
    return pipe("green", image=PICTURE, generator=generator, **arguments).images


def two_pipelines(scheduler: Any) -> tuple[Any, Any]:
    """Text to image, and image to image on the same denoiser with a scheduler of its own."""
    first = tiny_pipeline(StableDiffusionPipeline, scheduler=tiny_scheduler(scheduler))
    parts = {**first.components, "scheduler": scheduler.from_config(first.scheduler.config)}
    second = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    return first, second


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_pipeline_that_shares_the_denoiser_is_guided_by_its_own_scheduler(scheduler: Any) -> None:
    first, second = two_pipelines(scheduler)
    with GUIDANCE.attach(second):
        right = redraw(second)
    with GUIDANCE.attach(first):
        expected = draw(first)
        assert torch.equal(redraw(second), right)
        assert torch.equal(draw(first), expected)
    assert not torch.equal(redraw(second), right)


@pytest.mark.parametrize("idle_cfg", [1.0, 5.0])
def test_the_pipeline_that_runs_tells_what_the_batch_holds(idle_cfg: float) -> None:
    idle, running = tiny_pipeline(StableDiffusionPipeline), tiny_pipeline(StableDiffusionPipeline)
    running.unet, running.scheduler = idle.unet, idle.scheduler
    with GUIDANCE.attach(running):
        right = draw(running, guidance_scale=6.0 - idle_cfg)
    for steps in (5, 1):
        with GUIDANCE.attach(idle) as handle:
            draw(idle, guidance_scale=idle_cfg, num_inference_steps=steps)
            found = draw(running, guidance_scale=6.0 - idle_cfg)
            assert handle.mask is not None
            assert len(handle.mask) == 1
        assert torch.equal(found, right)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_deep_copy_of_a_guided_pipeline_draws_the_same(scheduler: Any) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline, scheduler=tiny_scheduler(scheduler))
    plain = draw(pipe)
    with GUIDANCE.attach(pipe):
        guided = draw(pipe)
        other = copy.deepcopy(pipe)
        assert torch.equal(draw(other), guided)
        del pipe
        assert torch.equal(draw(other), guided)
    assert torch.equal(draw(other), plain)


def test_two_pipelines_may_take_turns_at_every_step() -> None:
    first, second = two_pipelines(EulerDiscreteScheduler)
    with SelfAttentionGuidance(2.0).attach(first):
        expected = draw(first)
    with SelfAttentionGuidance(2.0, every=2).attach(first):
        right = redraw(second)
        found: list[Tensor] = []

        def between(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found.append(redraw(second))
            return tensors

        again = draw(first, callback_on_step_end=between)
    assert len(found) == 5
    assert all(torch.equal(each, right) for each in found)
    # The term that was held when the other run began is made anew.
    assert torch.equal(again, expected)


def test_another_scheduler_in_the_same_pipeline_is_followed() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    euler = tiny_scheduler(EulerDiscreteScheduler)
    with GUIDANCE.attach(pipe):
        draw(pipe)
        pipe.scheduler = euler
        found = draw(pipe)
    with GUIDANCE.attach(pipe):
        assert torch.equal(draw(pipe), found)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_that_does_not_run_is_refused(scheduler: Any) -> None:
    unet, running, idle = tiny_unet(), *(tiny_scheduler(scheduler) for _ in range(2))
    running.set_timesteps(5)
    idle.set_timesteps(7)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    message = r"is not at timestep .* attach guidance to the pipeline that runs"
    guided = GUIDANCE.attach(unet, scheduler=idle)
    with guided, torch.no_grad(), pytest.raises(ValueError, match=message):
        for t in running.timesteps:
            sample = running.scale_model_input(x, t)
            x = running.step(unet(sample, t, texts).sample, t, x).prev_sample


def run_beside(guidance: Any, scheduler: Any) -> None:
    """Attach with a scheduler that is never set, and run another one."""
    unet, idle, running = tiny_unet(), tiny_scheduler(scheduler), tiny_scheduler(DDIMScheduler)
    running.set_timesteps(5)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with guidance.attach(unet, scheduler=idle), torch.no_grad():
        for t in running.timesteps:
            unet(x, t, texts)


@pytest.mark.parametrize(
    "scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, PNDMScheduler]
)
def test_a_scheduler_that_needs_to_be_set_is_refused_before(scheduler: Any) -> None:
    """Its sigmas have the order of training until then, or it has no timesteps."""
    with pytest.raises(ValueError, match=f"{scheduler.__name__} is not set to a number of steps"):
        run_beside(GUIDANCE, scheduler)


@pytest.mark.parametrize("settings", [{"every": 2}, {"start": 0.3}, {"stop": 0.9}])
def test_steps_of_a_scheduler_that_was_not_set_can_t_be_counted(settings: Any) -> None:
    with pytest.raises(ValueError, match="has 1000 timesteps, of which the last call skipped"):
        run_beside(SelfAttentionGuidance(2.0, **settings), DDIMScheduler)


@pytest.mark.parametrize("settings", [{}, {"noise_to": 0.1}, {"scale": 0.0, "every": 2}])
def test_a_scheduler_that_was_not_set_knows_the_noise_of_its_timesteps(settings: Any) -> None:
    run_beside(SelfAttentionGuidance(**settings), DDIMScheduler)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_whose_run_is_over_is_refused(scheduler: Any) -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline, scheduler=tiny_scheduler(scheduler))
    draw(pipe)
    t, texts = pipe.scheduler.timesteps[0], torch.randn(1, 7, 32)
    guided = GUIDANCE.attach(pipe.unet, scheduler=pipe.scheduler)
    with guided, torch.no_grad(), pytest.raises(ValueError, match="is not at timestep"):
        pipe.unet(torch.randn(1, 4, 8, 8), t, texts)


def test_rounded_timesteps_are_those_of_the_scheduler() -> None:
    """Networks in half precision receive timesteps that are rounded."""
    unet, scheduler = (
        tiny_unet(),
        tiny_scheduler(EulerDiscreteScheduler, timestep_spacing="linspace"),
    )
    scheduler.set_timesteps(7)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    for form in (torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.long, float):
        with GUIDANCE.attach(unet, scheduler=scheduler) as handle, torch.no_grad():
            unet(x, form(scheduler.timesteps[0]), texts)
        assert handle.steps == 1


def test_an_inverse_scheduler_is_refused_by_name() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler(DDIMInverseScheduler)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="DDIMInverseScheduler is not supported"):
        GUIDANCE.attach(unet, scheduler=scheduler)


@pytest.mark.parametrize("method", ["invert", "generate_mask"])
def test_what_diffedit_does_before_it_draws_is_refused(method: str) -> None:
    """Also if the other scheduler is at the same timesteps."""
    parts = {"inverse_scheduler": tiny_scheduler(DDIMInverseScheduler)}
    pipe = tiny_pipeline(StableDiffusionDiffEditPipeline, **parts)
    pipe.scheduler.set_timesteps(4)
    arguments: dict[str, Any] = {"image": PICTURE, "num_inference_steps": 4}
    if method == "generate_mask":
        arguments |= {"source_prompt": "red", "target_prompt": "green", "num_maps_per_mask": 2}
    else:
        arguments["prompt"] = "red"
    message = rf"StableDiffusionDiffEditPipeline\.{method} is not supported, only the call"
    with GUIDANCE.attach(pipe), pytest.raises(ValueError, match=message):
        getattr(pipe, method)(**arguments)


def test_a_denoiser_that_replaces_the_guided_one_is_not_silently_unguided() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    message = "got another denoiser after guidance was attached"
    with pytest.raises(RuntimeError, match=message), GUIDANCE.attach(pipe):
        pipe.unet = tiny_unet(seed=1)
        draw(pipe)
    pipe.unet = tiny_unet()
    with GUIDANCE.attach(pipe):
        pipe.unet = copy.deepcopy(pipe.unet)


def test_the_error_of_a_run_is_not_hidden_by_the_one_about_the_denoiser() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    with pytest.raises(KeyError, match="mine"), GUIDANCE.attach(pipe):
        pipe.unet = tiny_unet(seed=1)
        raise KeyError("mine")
