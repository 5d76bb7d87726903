"""Guidance at every n-th step: the steps between add the last term again, and pay no pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance
from test_guidance import difference, draw
from test_guidance import pipe as pipe
from tiny import tiny_scheduler, tiny_unet
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


LEVELS = tiny_scheduler().alphas_cumprod.double()


class Rewritten(UNet2DConditionModel):
    """A network of predictions of noise that is rewritten to predict something else."""

    kind = "epsilon"
    scheduler: Any = None

    def forward(self, sample: Tensor, timestep: Any, states: Tensor, **_: Any) -> Any:
        if self.kind == "flow_prediction":  # x / (alpha + sigma) is what flow matching sees
            sigma = self.scheduler.sigmas[self.scheduler.step_index or 0].double()
            share = sigma / (1 - sigma)
            level = 1 / (1 + share**2)
            near = (LEVELS - level).abs().argmin()
            alpha, sigma_t = level.sqrt(), (1 - level).sqrt()
            noise = super().forward(sample * (alpha + sigma_t), near, states).sample
            clean = (sample - sigma * noise) / (1 - sigma)
            return UNet2DConditionOutput(noise - clean)
        noise = super().forward(sample, timestep, states).sample
        level = LEVELS[int(timestep)]
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
        clean = (sample - sigma * noise) / alpha
        outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
        return UNet2DConditionOutput(outputs[self.kind])


def draw_as(kind: str, every: int, scale: float = 2.0) -> Tensor:
    """Latents that one function draws, written as a prediction of one kind, with DDIM's steps.

    DDIM's step, of x0 and noise, is Euler's step of flow matching in other coordinates.
    """
    unet: Any = tiny_unet().double()
    unet.__class__, unet.kind = Rewritten, kind
    usual = tiny_scheduler()
    usual.set_timesteps(12)
    levels = [LEVELS[int(t)] for t in usual.timesteps] + [usual.final_alpha_cumprod.double()]
    sums = [float(level.sqrt() + (1 - level).sqrt()) for level in levels]
    scheduler: Any = usual
    if kind == "flow_prediction":
        scheduler = FlowMatchEulerDiscreteScheduler()
        sigmas = [
            float((1 - level).sqrt()) / total for level, total in zip(levels, sums, strict=True)
        ]
        scheduler.set_timesteps(sigmas=sigmas[:-1])
        scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        unet.scheduler = scheduler
    else:
        scheduler = tiny_scheduler(prediction_type=kind)
        scheduler.set_timesteps(12)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)).double()
    is_flow = kind == "flow_prediction"
    guidance = SelfAttentionGuidance(scale, every=every, blur_sigma=2.0)
    with guidance.attach(unet, scheduler=scheduler, batch_layout="single"), torch.no_grad():
        x = x / sums[0] if is_flow else x
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, states).sample, t, x).prev_sample.double()
        return x * sums[-1] if is_flow else x


@pytest.mark.parametrize("every", [1, 3, 5])
def test_one_function_draws_one_picture_however_its_prediction_is_written(every: int) -> None:
    """The term is held as noise: in units of the output it would mean another thing each step."""
    expected = draw_as("epsilon", every)
    effect = (expected - draw_as("epsilon", every, 0.0)).norm()
    assert effect > 0.05 * expected.norm()
    for kind in ("v_prediction", "sample", "flow_prediction"):
        assert (draw_as(kind, every) - expected).norm() < 1e-5 * effect


@pytest.mark.parametrize("name", ["zero terminal SNR", "flow matching"])
def test_where_there_is_no_signal_nothing_is_held(name: str) -> None:
    if name == "flow matching":
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(6)
    else:
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        scheduler = tiny_scheduler(DDIMScheduler, "v_prediction", **zero)
        scheduler.set_timesteps(6)
        scheduler.alphas_cumprod[-1] = 0.0
    unet, states = tiny_unet(), torch.randn(1, 7, 32)
    x = torch.randn(1, 4, 8, 8)
    passes: list[int] = []
    with (
        SelfAttentionGuidance(1.0, every=3).attach(unet, scheduler=scheduler) as handle,
        torch.no_grad(),
    ):
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, states).sample, t, x).prev_sample
            passes.append(handle.steps)
    assert x.isfinite().all()
    assert passes == [1, 2, 2, 2, 3, 3]


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
