"""Pixel-space models: what guidance does to them, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from recordings import config, difference, network
from self_attention_guidance import (
    ADMPipeline,
    ADMUNet2DModel,
    BlurGuidance,
    NoisyClassifier,
    SelfAttentionGuidance,
)
from self_attention_guidance.maths import degrade
from self_attention_guidance.models.originals import original_scheduler
from tiny import aligned, seeded

GUIDANCE = SelfAttentionGuidance(1.0, blur_sigma=3.0, blur_kernel_size=13)
SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def small_unet(cls: Any = UNet2DModel, **changes: Any) -> Any:
    with seeded(0):
        unet = cls(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "to_q.weight" in name or "to_k.weight" in name:
                parameter.mul_(4.0)
    return unet


def pipeline(
    scheduler: Any = None, guidance: Any = GUIDANCE, unet: Any = None, **parts: Any
) -> ADMPipeline:
    pipe = ADMPipeline(
        small_unet() if unet is None else unet, scheduler or DDIMScheduler(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.guidance = guidance
    return pipe


def draw(pipe: ADMPipeline, seeds: tuple[int, ...] = (0,), **arguments: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": 4, "output_type": "latent", "batch_size": len(seeds)}
    return pipe(generator=generators, **{**settings, **arguments}).images


def small_classifier() -> NoisyClassifier:
    with seeded(1):
        return NoisyClassifier(
            num_classes=5,
            sample_size=16,
            block_out_channels=(32, 32),
            layers_per_block=1,
            attention_head_dim=16,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            timestep_channels=32,
        ).eval()


SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.supports("runs", pipeline="ADM and IDDPM")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_is_guided_and_scale_zero_is_bit_equal(scheduler: Any) -> None:
    pipe = pipeline(scheduler())
    unguided, nothing = draw(pipe, sag_scale=0), pipe.guidance_handle
    assert nothing is None
    assert difference(draw(pipe), unguided) > 1e-2
    assert pipe.guidance_handle is not None
    assert not pipe.guidance_handle.attached
    assert torch.equal(draw(pipe, sag_scale=0), unguided)
    assert not pipe.unet._forward_hooks


@torch.no_grad()
def test_the_loop_is_that_of_diffusers() -> None:
    pipe = pipeline(DDIMScheduler(), unet=network_without_classes())
    theirs = DDIMPipeline(pipe.unet, DDIMScheduler())
    theirs.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)}
    expected = theirs(
        num_inference_steps=4, output_type="np", use_clipped_model_output=True, **arguments
    ).images
    found = draw(pipe, sag_scale=0, output_type="np")
    assert abs(found - expected).max() < 1e-5


def network_without_classes() -> UNet2DModel:
    return small_unet()


# In float64: the first steps multiply a rounding error by 157, whatever the batch.
@pytest.mark.supports("batch", pipeline="ADM and IDDPM")
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_pictures_depend_neither_on_their_batch_nor_on_its_order(scheduler: Any) -> None:
    pipe = pipeline(scheduler(), unet=small_unet().double())
    together, handle = draw(pipe, (3, 4, 5)), pipe.guidance_handle
    assert handle is not None
    assert handle.mask is not None
    size = together.abs().max()
    assert difference(draw(pipe, (5, 4, 3)).flip(0), together) < 1e-5 * size
    for row, seed in enumerate((3, 4, 5)):
        assert difference(draw(pipe, (seed,)), together[row : row + 1]) < 1e-5 * size
        alone = pipe.guidance_handle
        assert alone is not None
        assert alone.mask is not None
        assert torch.equal(alone.mask[0], handle.mask[row])


@torch.no_grad()
def test_a_guided_output_depends_neither_on_its_batch_nor_on_its_order() -> None:
    unet, scheduler = small_unet(), DDIMScheduler()
    scheduler.set_timesteps(4)
    x_t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with GUIDANCE.attach(unet, scheduler=scheduler) as handle:
        together, mask = unet(x_t, 500).sample, handle.mask
        assert mask is not None
        size = together.abs().max()
        assert difference(unet(x_t.flip(0), 500).sample.flip(0), together) < 1e-4 * size
        for row in range(3):
            alone = unet(x_t[row : row + 1], 500).sample
            assert difference(alone, together[row : row + 1]) < 1e-4 * size
            assert handle.mask is not None
            assert torch.equal(handle.mask[0], mask[row])


@pytest.mark.supports("formula", pipeline="ADM and IDDPM")
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_a_guided_output_is_the_formula(scale: float, kind: str) -> None:
    unet = small_unet(ADMUNet2DModel, timestep_scale=scale, num_heads=4)
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(4)
    x_t, timestep = torch.randn(2, 3, 16, 16), 500
    seen = torch.tensor(timestep * scale)
    plain = unet(x_t, seen).sample
    with GUIDANCE.attach(unet, scheduler=scheduler) as handle:
        guided = unet(x_t, seen).sample
    level = scheduler.alphas_cumprod[timestep]
    alpha, sigma = level.sqrt(), (1 - level).sqrt()

    def split(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "epsilon":
            return (x - sigma * u) / alpha, u
        x0 = u if kind == "sample" else alpha * x - sigma * u
        return x0, (x - alpha * x0) / sigma

    x0, eps = split(plain, x_t)
    assert handle.mask is not None
    x_degraded = alpha * degrade(x0, handle.mask, 3.0, 13) + sigma * eps
    _, eps_degraded = split(unet(x_degraded, seen).sample, x_degraded)
    _, eps_guided = split(guided, x_t)
    expected = eps + (eps - eps_degraded)
    assert difference(eps_guided, expected) < 1e-4 * expected.abs().max()


def test_the_network_sees_rescaled_timesteps() -> None:
    seen: list[float] = []
    unet = small_unet(ADMUNet2DModel, timestep_scale=0.25)
    unet.register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    draw(pipeline(DDIMScheduler(4000), unet=unet), sag_scale=0)
    assert seen == [750, 500, 250, 0]


@pytest.mark.parametrize("total", [5, 10, 25, 250])
def test_the_last_steps_alone_can_be_guided(total: int) -> None:
    for guided in range(1, total + 1, max(1, total // 10)):
        settings = BlurGuidance(1.0, start=1 - guided / total)
        counted = [settings.acts_at(step, total) for step in range(total)]
        assert counted == [False] * (total - guided) + [True] * guided


def test_learned_variance_is_used_by_ddpm_alone() -> None:
    unet = small_unet(out_channels=6)
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler(), DDPMScheduler()):
        assert torch.isfinite(draw(pipeline(scheduler, unet=unet))).all()
    fixed = draw(pipeline(DDPMScheduler(), unet=unet))
    learned = draw(pipeline(DDPMScheduler(variance_type="learned_range"), unet=unet))
    assert difference(fixed, learned) > 1e-3
    with pytest.raises(ValueError, match="the network has learned no variance"):
        draw(pipeline(DDPMScheduler(variance_type="learned_range")))


def test_blur_guidance_blurs_everywhere_and_reads_no_attention() -> None:
    everywhere = SelfAttentionGuidance(1.0, blur_sigma=3.0, blur_kernel_size=13, threshold=0.0)
    pipe = pipeline(guidance=everywhere)
    expected = draw(pipe)
    pipe.guidance = BlurGuidance(1.0, blur_sigma=3.0, blur_kernel_size=13)
    assert torch.equal(draw(pipe), expected)
    handle = pipe.guidance_handle
    assert handle is not None
    assert handle.mask is not None
    assert handle.attention is None
    assert handle.mask.shape == (1, 16, 16)
    assert handle.mask.all()
    assert difference(draw(pipe, sag_scale=0), expected) > 1e-2


def test_blur_guidance_needs_no_attention_layer() -> None:
    without = small_unet(
        add_attention=False,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipe = pipeline(guidance=BlurGuidance(1.0, blur_sigma=2.0), unet=without)
    assert difference(draw(pipe), draw(pipe, sag_scale=0)) > 1e-3
    with pytest.raises(ValueError, match="has no self-attention; BlurGuidance"):
        draw(pipeline(unet=without))


def test_a_classifier_guides_towards_its_class() -> None:
    classifier = small_classifier()
    pipe = pipeline(DDIMScheduler(), SelfAttentionGuidance(0), classifier=classifier)
    unguided = draw(pipe, (1, 2), class_labels=3, classifier_scale=0)
    guided = draw(pipe, (1, 2), class_labels=3, classifier_scale=300.0)
    away = draw(pipe, (1, 2), class_labels=3, classifier_scale=-300.0)
    with torch.no_grad():
        chances = [
            classifier(x, torch.zeros(2)).log_softmax(-1)[:, 3].mean()
            for x in (away, unguided, guided)
        ]
    assert chances[0] < chances[1] < chances[2]
    assert torch.equal(unguided, draw(pipe, (1, 2)))
    assert not torch.equal(unguided, draw(pipe, (1, 2), class_labels=3))


@torch.no_grad()
def test_other_schedulers_move_the_noise_by_the_gradient() -> None:
    classifier = small_classifier()
    pipe = pipeline(EulerDiscreteScheduler(), SelfAttentionGuidance(0), classifier=classifier)
    found = draw(pipe, class_labels=2, classifier_scale=5.0, num_inference_steps=2)
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, timestep)
        with torch.enable_grad():
            leaf = x_in.detach().requires_grad_(True)
            chance = classifier(leaf, timestep[None]).log_softmax(-1)[0, 2]
            (gradient,) = torch.autograd.grad(chance, leaf)
        sigma = scheduler.sigmas[scheduler.index_for_timestep(timestep)]
        eps = pipe.unet(x_in, timestep).sample - 5.0 * gradient * sigma / (1 + sigma**2).sqrt()
        x = scheduler.step(eps, timestep, x).prev_sample
    assert difference(found, x) < 1e-4 * x.abs().max()


def test_classifier_guidance_works_in_inference_mode() -> None:
    pipe = pipeline(DDIMScheduler(), SelfAttentionGuidance(0), classifier=small_classifier())
    expected = draw(pipe, class_labels=3, classifier_scale=300.0)
    with torch.inference_mode():
        found = draw(pipe, class_labels=3, classifier_scale=300.0)
    assert torch.equal(found, expected)


def test_labels_reach_the_network() -> None:
    unet = small_unet(num_class_embeds=5)
    pipe = pipeline(unet=unet)
    for label in (torch.tensor(1), np.int64(1), np.array(1), [1]):
        assert torch.equal(draw(pipe, class_labels=label), draw(pipe, class_labels=1))
    assert difference(draw(pipe, class_labels=1), draw(pipe, class_labels=2)) > 1e-4
    pair = draw(pipe, (0, 0), class_labels=[1, 2])
    assert difference(pair[:1], pair[1:]) > 1e-4
    with pytest.raises(ValueError, match="class_labels=None must be given"):
        draw(pipe)
    with pytest.raises(ValueError, match="must be from 0 to 4"):
        draw(pipe, class_labels=5)
    unconditional = pipeline(unet=unet, null_label=4)
    assert torch.equal(draw(unconditional), draw(pipe, class_labels=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be"),
        ({"eta": -0.1}, "eta=-0.1 must be at least 0"),
        ({"output_type": "jpg"}, "output_type='jpg' must be one of"),
        ({"sag_scale": float("nan")}, "sag_scale=nan must be"),
        ({"class_labels": 1}, "the model has no classes"),
        ({"classifier_scale": 1.0}, "the pipeline has no classifier"),
        (
            {"batch_size": 2, "latents": torch.zeros(1, 3, 16, 16)},
            "number of pictures is not clear",
        ),
        ({"latents": torch.zeros(1, 4, 16, 16)}, "must be of shape"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"batch_size": 2}, "generator: 1 given for 2 pictures"),
    ],
)
def test_arguments_without_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipeline(), **arguments)


def test_fresh_noise_is_refused_where_the_scheduler_would_ignore_it() -> None:
    with pytest.raises(ValueError, match=r"eta=0.5 has no effect with EulerDiscreteScheduler"):
        draw(pipeline(EulerDiscreteScheduler()), eta=0.5)


def test_callbacks_change_latents_and_failures_leave_nothing_behind() -> None:
    pipe = pipeline()
    steps: list[int] = []

    def zero(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": tensors["latents"] * 0} if step == 3 else {}

    assert not draw(pipe, callback_on_step_end=zero).any()
    assert steps == [0, 1, 2, 3]

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        draw(pipe, callback_on_step_end=fail)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_outputs_and_the_share_of_fresh_noise() -> None:
    pipe = pipeline()
    latent = draw(pipe)
    assert draw(pipe, output_type="pil")[0].size == (16, 16)
    assert draw(pipe, output_type="np").shape == (1, 16, 16, 3)
    assert torch.equal(draw(pipe, output_type="pt"), (latent / 2 + 0.5).clamp(0, 1))
    assert difference(draw(pipe, eta=1.0), latent) > 1e-2
    assert torch.equal(draw(pipe, eta=1.0), draw(pipe, eta=1.0))
    assert isinstance(pipe(num_inference_steps=1, return_dict=False), tuple)


def test_saved_pipelines_load_with_their_classifier_and_label(tmp_path: Path) -> None:
    scheduler = original_scheduler("adm", config("adm"))
    saved = ADMPipeline(network("adm"), scheduler, network("classifier"), null_label=9)
    saved.save_pretrained(tmp_path)
    loaded = aligned(ADMPipeline.from_pretrained(tmp_path))
    assert isinstance(loaded.unet, ADMUNet2DModel)
    assert isinstance(loaded.classifier, NoisyClassifier)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    first, second = (
        pipe(generator=torch.Generator().manual_seed(0), **arguments).images
        for pipe in (saved, loaded)
    )
    assert torch.equal(first, second)


def test_half_precision_networks_are_guided() -> None:
    pipe = pipeline(unet=small_unet().to(torch.bfloat16))
    guided = draw(pipe)
    assert guided.dtype == torch.bfloat16
    assert difference(guided, draw(pipe, sag_scale=0)) > 1e-2


def test_attach_knows_diffusers_own_pipelines_of_pixels() -> None:
    theirs = DDIMPipeline(small_unet(), DDIMScheduler())
    theirs.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    plain = theirs(generator=torch.Generator().manual_seed(0), **arguments).images
    with GUIDANCE.attach(theirs) as handle:
        guided = theirs(generator=torch.Generator().manual_seed(0), **arguments).images
    assert handle.steps == 3
    assert abs(plain - guided).max() > 1e-2
