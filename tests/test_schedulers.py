"""Every scheduler and prediction type against the plain implementation in `reference`."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers

import reference
from self_attention_guidance import SelfAttentionGuidance, StableDiffusionSAGPipeline
from self_attention_guidance.generate.schedulers import check_steps_of
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

# diffusers' KDPM2 schedulers hand a tensor to a NumPy function
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

TOLERANCE = 1e-3
SCALE = 1.0
STEPS = 4
PREDICTIONS = ("epsilon", "v_prediction", "sample")
NAMES = [member.name for member in KarrasDiffusionSchedulers]
NO_SAMPLE_PREDICTION = {
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
}
WITH_SIGMA_TABLES = [
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
]


def build(name: str, prediction_type: str = "epsilon", **config: Any) -> Any:
    """Return a scheduler by class name; the Brownian tree of DPM-Solver-SDE is seeded."""
    if name == "DPMSolverSDEScheduler":
        config.setdefault("noise_sampler_seed", 5)
    return tiny_scheduler(getattr(diffusers, name), prediction_type, **config)


@functools.cache
def shared_unet(heads: int | tuple[int, ...] = 4, levels: int = 2) -> Any:
    """One denoiser for many tests."""
    return tiny_unet(heads=list(heads) if isinstance(heads, tuple) else heads, levels=levels)


@functools.cache
def embeddings(prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(uncond, cond) text embeddings of `prompts` different prompts."""
    pipe = tiny_pipeline(StableDiffusionSAGPipeline, unet=shared_unet())
    texts = ["a red apple", "two blue birds", "sea"][:prompts]
    cond, uncond = pipe.encode_prompt(texts, "cpu", 1, True, [""] * prompts)
    return uncond, cond


def start(batch: int, height: int, width: int, seed: int = 3) -> torch.Tensor:
    """Unit noise of a picture's latent size, `height` and `width` in pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, height // 8, width // 8, generator=generator)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_agrees(ours: torch.Tensor, guided: reference.Trace, plain: reference.Trace) -> None:
    """The latents agree, guidance did something, and no mask was decided by rounding."""
    assert guided.margin > 1e-5, "the reference's mask is borderline: choose another seed"
    assert 0.05 < guided.masked_share < 0.95
    assert distance(guided.latents, plain.latents) > 20 * TOLERANCE
    assert distance(ours, guided.latents) < TOLERANCE


def compare(
    scheduler: Any,
    *,
    guidance_scale: float = 7.5,
    size: tuple[int, int] = (64, 64),
    prompts: int = 1,
    images: int = 1,
    unet: Any = None,
    reference_schedule: dict[str, Any] | None = None,
    step_options: dict[str, Any] | None = None,
    **call: Any,
) -> None:
    """Run the pipeline and the reference from one start and compare the final latents."""
    unet = unet or shared_unet()
    uncond, cond = embeddings(prompts)
    latents = start(prompts * images, *size)
    twin = type(scheduler).from_config(scheduler.config)
    call = call or {"num_inference_steps": STEPS}
    pipe = tiny_pipeline(StableDiffusionSAGPipeline, unet=unet)
    pipe.scheduler = scheduler  # the constructor would switch clip_sample off
    ours = pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        latents=latents,
        height=size[0],
        width=size[1],
        guidance_scale=guidance_scale,
        num_images_per_prompt=images,
        sag_scale=SCALE,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        **call,
        **(step_options or {}),
    ).images
    rows = [rows.repeat_interleave(images, 0) for rows in (uncond, cond)]
    traces = [
        reference.sample(
            unet,
            twin,
            latents,
            (rows[0] if guidance_scale > 1 else None, rows[1]),
            guidance_scale=guidance_scale,
            sag_scale=scale,
            generator=torch.Generator().manual_seed(11),
            step_options=step_options,
            **(reference_schedule or call),
        )
        for scale in (SCALE, 0.0)
    ]
    assert_agrees(ours, *traces)


def test_the_list_of_schedulers_is_the_one_these_tests_know() -> None:
    assert len(NAMES) == 15


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_and_prediction_type(
    name: str, prediction_type: str, guidance_scale: float
) -> None:
    if prediction_type == "sample" and name in NO_SAMPLE_PREDICTION:
        pytest.skip("refused by the scheduler, see the next test")
    compare(build(name, prediction_type), guidance_scale=guidance_scale)


@pytest.mark.parametrize("name", sorted(NO_SAMPLE_PREDICTION))
def test_what_a_scheduler_refuses_stays_refused(name: str) -> None:
    uncond, cond = embeddings(1)
    with pytest.raises((ValueError, NotImplementedError), match=r"[Pp]rediction.type"):
        scheduler = build(name, "sample")
        reference.sample(
            shared_unet(),
            scheduler,
            start(1, 64, 64),
            (uncond, cond),
            sag_scale=0.0,
            num_inference_steps=STEPS,
        )
    scheduler = build(name, "sample")
    pipe = tiny_pipeline(StableDiffusionSAGPipeline, unet=shared_unet(), scheduler=scheduler)
    with pytest.raises((ValueError, NotImplementedError), match=r"[Pp]rediction.type"):
        pipe("a red apple", num_inference_steps=STEPS, output_type="latent")


@pytest.mark.parametrize(
    ("option", "prediction_type"),
    [
        ("use_karras_sigmas", "v_prediction"),
        ("use_exponential_sigmas", "epsilon"),
        ("use_beta_sigmas", "v_prediction"),
    ],
)
@pytest.mark.parametrize("name", WITH_SIGMA_TABLES)
def test_other_sigma_tables(name: str, option: str, prediction_type: str) -> None:
    compare(build(name, prediction_type, **{option: True}))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_timestep_spacings(name: str, spacing: str) -> None:
    compare(build(name, timestep_spacing=spacing))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr(name: str) -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    compare(build(name, "v_prediction", **config))


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pndm_with_and_without_runge_kutta_steps(
    skip_prk_steps: bool, prediction_type: str
) -> None:
    scheduler = build("PNDMScheduler", prediction_type, skip_prk_steps=skip_prk_steps)
    compare(scheduler, num_inference_steps=6)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_dpm_solver_algorithms(algorithm: str, prediction_type: str) -> None:
    config = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    compare(build("DPMSolverMultistepScheduler", prediction_type, **config))


def test_ddim_with_fresh_noise() -> None:
    compare(build("DDIMScheduler"), step_options={"eta": 0.7})


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
def test_clean_sample_is_clipped_before_the_blur(name: str, prediction_type: str) -> None:
    config = {"clip_sample": True, "clip_sample_range": 0.5}
    compare(build(name, prediction_type, **config), guidance_scale=2.0)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_timesteps_by_hand(name: str) -> None:
    compare(build(name), timesteps=[950, 700, 333, 40])


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_sigmas_by_hand(name: str) -> None:
    sigmas = [9.0, 3.0, 1.2, 0.3]
    if name == "EDMEulerScheduler":  # the pipeline and the scheduler differ in what they take
        compare(build(name), sigmas=torch.tensor(sigmas) / 10)
    else:
        compare(build(name), sigmas=sigmas)


@pytest.mark.parametrize("size", [(64, 80), (72, 88), (56, 104), (104, 72)])
@pytest.mark.parametrize("levels", [2, 3])
def test_sizes_the_masks_grid_does_not_divide(size: tuple[int, int], levels: int) -> None:
    compare(build("DDIMScheduler"), size=size, unet=shared_unet(levels=levels))


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_batches(name: str, guidance_scale: float) -> None:
    compare(build(name), prompts=2, images=2, guidance_scale=guidance_scale, size=(72, 64))


def test_heads_that_differ_between_levels() -> None:
    compare(build("DDIMScheduler"), unet=shared_unet(heads=(2, 8)))


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"EDMEulerScheduler"}))
def test_a_schedule_begun_in_the_middle(name: str, guidance_scale: float) -> None:
    unet, (uncond, cond), steps = shared_unet(), embeddings(1), 6
    clean = start(1, 72, 64, seed=8)
    scheduler = build(name)
    pipe = tiny_pipeline(StableDiffusionImg2ImgPipeline, unet=unet, scheduler=scheduler)
    with SelfAttentionGuidance(SCALE).attach(pipe):
        ours = pipe(
            image=clean,
            strength=0.5,
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(11),
            output_type="latent",
        ).images
    traces = [
        reference.sample(
            unet,
            build(name),
            clean,
            (uncond if guidance_scale > 1 else None, cond),
            guidance_scale=guidance_scale,
            sag_scale=scale,
            generator=torch.Generator().manual_seed(11),
            first=steps // 2 * scheduler.order,
            num_inference_steps=steps,
        )
        for scale in (SCALE, 0.0)
    ]
    assert_agrees(ours, *traces)


@pytest.mark.parametrize(
    ("name", "steps", "rule"),
    [
        ("DDIMScheduler", 1000, "at most 999"),  # its timesteps begin at 1000, beyond the table
        ("DDPMScheduler", 1001, "at most 999"),
        ("PNDMScheduler", 3, "at least 4"),
        ("PNDMScheduler", 1001, "at most 999"),
        # All timesteps would be the last one: pure noise, without an error.
        ("EulerDiscreteScheduler", 1001, "at most 1000"),
        ("DPMSolverMultistepScheduler", 1000, "at most 999"),
    ],
)
def test_steps_that_a_scheduler_cannot_take(name: str, steps: int, rule: str) -> None:
    scheduler = build(name, steps_offset=1, timestep_spacing="leading")
    with pytest.raises(ValueError, match=f"num_inference_steps={steps} must be {rule} with {name}"):
        check_steps_of(scheduler, steps)
    check_steps_of(scheduler, int(rule.rpartition(" ")[2]))


@pytest.mark.parametrize("name", NAMES)
def test_usual_numbers_of_steps_are_taken(name: str) -> None:
    for spacing in ("leading", "linspace", "trailing"):
        config = {**tiny_scheduler().config, "timestep_spacing": spacing}
        for steps in (4, 50, 999):
            check_steps_of(getattr(diffusers, name).from_config(config), steps)


def test_edm_euler_made_from_another_schedulers_config_is_refused() -> None:
    config = build("DDIMScheduler").config
    scheduler = diffusers.EDMEulerScheduler.from_config(config)
    pipe = tiny_pipeline(StableDiffusionSAGPipeline, unet=shared_unet(), scheduler=scheduler)
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        pipe("a red apple", num_inference_steps=2, output_type="latent")


def test_a_scheduler_that_cannot_set_its_steps_is_refused_by_name() -> None:
    class ForStages(diffusers.DDIMScheduler):
        def set_timesteps(self, *_: Any, **__: Any) -> None:
            raise KeyError(None)

    with pytest.raises(ValueError, match="num_inference_steps=4 is not possible with ForStages"):
        check_steps_of(ForStages(), 4)
