"""Guidance at every n-th step: the steps between add the last term again, and pay no pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance
from test_guidance import difference, draw
from test_guidance import pipe as pipe
from tiny import tiny_scheduler
from tiny_transformers import TRANSFORMERS
from tiny_transformers import draw as draw_transformer


def terms(pipe: Any, guidance: SelfAttentionGuidance, **arguments: Any) -> list[Tensor]:
    """The term that was added at every step."""
    found: list[Tensor] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert handle.term is not None
        found.append(handle.term.clone())
        return tensors

    with guidance.attach(pipe) as handle:
        draw(pipe, callback_on_step_end=note, **arguments)
    return found


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_term_is_new_at_every_nth_step_and_the_same_between(
    pipe: StableDiffusionPipeline, scheduler: type, guidance_scale: float
) -> None:
    pipe.scheduler = tiny_scheduler(scheduler)
    found = terms(
        pipe,
        SelfAttentionGuidance(1.0, every=3),
        num_inference_steps=7,
        guidance_scale=guidance_scale,
    )
    same = [torch.equal(a, b) for a, b in itertools.pairwise(found)]
    assert same == [True, True, False, True, True, False]


def test_what_is_held_is_added(pipe: StableDiffusionPipeline) -> None:
    """Against a loop that adds the terms by hand."""
    guidance = SelfAttentionGuidance(1.0, every=2)
    found = terms(pipe, guidance, num_inference_steps=4, guidance_scale=1.0)
    with guidance.attach(pipe):
        guided = draw(pipe, num_inference_steps=4, guidance_scale=1.0)
    added = iter(found)

    def add(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + next(added), *output[1:])

    hook = pipe.unet.register_forward_hook(add)
    by_hand = draw(pipe, num_inference_steps=4, guidance_scale=1.0)
    hook.remove()
    assert difference(by_hand, guided) < 1e-6


@pytest.mark.parametrize(("every", "passes"), [(1, 8), (2, 4), (3, 3), (8, 1), (20, 1)])
def test_a_held_step_costs_nothing(pipe: StableDiffusionPipeline, every: int, passes: int) -> None:
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with SelfAttentionGuidance(1.0, every=every).attach(pipe) as handle:
        draw(pipe, num_inference_steps=8)
    assert handle.steps == passes
    assert sum(rows) == 2 * 8 + passes


def test_the_part_of_the_steps_begins_with_a_second_pass_and_ends_the_holding(
    pipe: StableDiffusionPipeline,
) -> None:
    seen: list[int] = []
    guidance = SelfAttentionGuidance(1.0, every=2, start=0.25, stop=0.625)
    with guidance.attach(pipe) as handle:

        def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(handle.steps)
            return tensors

        draw(pipe, num_inference_steps=8, callback_on_step_end=note)
    assert seen == [0, 0, 1, 1, 2, 2, 2, 2]


def test_a_picture_does_not_begin_with_the_term_of_the_one_before(
    pipe: StableDiffusionPipeline,
) -> None:
    with SelfAttentionGuidance(1.0, every=5).attach(pipe) as handle:
        first = draw(pipe, num_inference_steps=3)
        draw(pipe, seeds=(1,), num_inference_steps=3)
        draw(pipe, seeds=(1, 2), num_inference_steps=3)
        assert torch.equal(draw(pipe, num_inference_steps=3), first)
    assert handle.steps == 4


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [(HeunDiscreteScheduler, {}), (PNDMScheduler, {"skip_prk_steps": True})],
)
def test_schedulers_that_evaluate_a_step_twice(
    pipe: StableDiffusionPipeline, scheduler: type, config: dict[str, Any]
) -> None:
    pipe.scheduler = tiny_scheduler(scheduler, **config)
    with SelfAttentionGuidance(1.0).attach(pipe) as exact:
        expected = draw(pipe, num_inference_steps=6)
    with SelfAttentionGuidance(1.0, every=2).attach(pipe) as handle:
        held = draw(pipe, num_inference_steps=6)
    assert exact.steps // 2 <= handle.steps <= exact.steps // 2 + 1
    assert difference(held, expected) > 1e-6


def test_several_samples_denoised_in_turn_are_refused(pipe: StableDiffusionPipeline) -> None:
    """Each of the two would be guided by the other's term."""
    scheduler, text = tiny_scheduler(DDIMScheduler), torch.zeros(1, 7, 32)
    scheduler.set_timesteps(4)
    samples = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guidance = SelfAttentionGuidance(1.0, every=2)
    first, second = scheduler.timesteps[:2]
    with torch.no_grad(), guidance.attach(pipe.unet, scheduler=scheduler):
        for sample in samples:
            pipe.unet(sample, first, text)
        with pytest.raises(RuntimeError, match="every=1"):
            pipe.unet(samples[0], second, text)


@pytest.mark.parametrize("branch", ["uncond", "cond"])
@pytest.mark.parametrize("name", ["Chroma", "Flux"])
def test_two_calls_a_step_hold_one_term(name: str, branch: Any) -> None:
    pipe = TRANSFORMERS[name].make()
    exact = SelfAttentionGuidance(1.0, branch=branch)
    with exact.attach(pipe) as handle:
        expected, steps = (
            draw_transformer(name, pipe, (3,), 3.0, num_inference_steps=4),
            handle.steps,
        )
    with SelfAttentionGuidance(1.0, branch=branch, every=2).attach(pipe) as handle:
        held = draw_transformer(name, pipe, (3,), 3.0, num_inference_steps=4)
    plain = draw_transformer(name, pipe, (3,), 3.0, num_inference_steps=4)
    assert handle.steps < steps
    assert difference(held, plain) > 1e-4
    assert difference(held, expected) > 1e-6


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_every_is_a_count(every: Any) -> None:
    with pytest.raises(ValueError, match="every="):
        SelfAttentionGuidance(every=every)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_the_fast_preset_pays_for_a_sixth_of_the_steps(
    pipe: StableDiffusionPipeline, guidance_scale: float
) -> None:
    plain = draw(pipe, num_inference_steps=25, guidance_scale=guidance_scale)
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with SelfAttentionGuidance.fast().attach(pipe):
        guided = draw(pipe, num_inference_steps=25, guidance_scale=guidance_scale)
    unguided = 25 * (1 if guidance_scale == 1 else 2)
    assert sum(rows) == unguided + 4
    assert difference(guided, plain) > 1e-2


def test_the_fast_preset_takes_all_settings() -> None:
    chosen = SelfAttentionGuidance.fast(2.0, blur_sigma=3.0, every=2)
    assert chosen == SelfAttentionGuidance(
        2.0, blur_sigma=3.0, every=2, start=chosen.start, stop=chosen.stop
    )
    with pytest.raises(ValueError, match="stop"):
        SelfAttentionGuidance.fast(stop=0.1)
