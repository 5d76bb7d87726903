"""`attach` on diffusers' other pipelines of transformers, and what it refuses."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    IFSuperResolutionPipeline,
    MarigoldDepthPipeline,
    SanaTransformer2DModel,
    StableCascadeUNet,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from packaging.version import Version
from PIL import Image
from torch import Tensor

from self_attention_guidance import BlurGuidance, SelfAttentionGuidance
from tiny import BETAS, tiny_unet, tiny_vae
from tiny_transformers import (
    TRANSFORMERS,
    chroma,
    draw,
    flux,
    qwen_image,
    stable_diffusion_3,
    z_image,
)

PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
MASK = Image.new("L", (96, 64), 0)
MASK.paste(255, (16, 16, 64, 48))
TWO_CALLS: dict[str, Any] = {"batch_layout": "cond_call_first"}
FILL = 16 + 16 + 8 * 8 * 4
"""Channels of a token that FLUX.1 Fill sees: latents, masked picture, mask."""


def task(pipeline: type, source: Callable[..., Any], **config: Any) -> Any:
    """A pipeline of class `pipeline` with the components of another one, and an autoencoder."""
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    parts = {**source(**config).components, "vae": vae}
    known = inspect.signature(pipeline).parameters
    pipe = pipeline(**{name: part for name, part in parts.items() if name in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


TASKS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "Flux, image to image": (
        "Flux",
        lambda: task(FluxImg2ImgPipeline, flux),
        {"image": PICTURE, "strength": 0.9},
    ),
    "Flux, inpainting": (
        "Flux",
        lambda: task(FluxInpaintPipeline, flux),
        {"image": PICTURE, "mask_image": MASK, "strength": 0.9},
    ),
    "Flux Fill": (
        "Flux",
        lambda: task(FluxFillPipeline, flux, in_channels=FILL),
        {"image": PICTURE, "mask_image": MASK},
    ),
    "Flux Kontext": (
        "Flux",
        lambda: task(FluxKontextPipeline, flux),
        {"image": PICTURE, "_auto_resize": False, "max_area": 64 * 96},
    ),
    "Stable Diffusion 3.5, image to image": (
        "Stable Diffusion 3.5",
        lambda: task(StableDiffusion3Img2ImgPipeline, stable_diffusion_3),
        {"image": PICTURE, "strength": 0.9},
    ),
    "Z-Image, image to image": (
        "Z-Image",
        lambda: task(ZImageImg2ImgPipeline, z_image),
        {"image": PICTURE, "strength": 0.9},
    ),
}


@pytest.mark.supports("runs", "batch")
@pytest.mark.parametrize(
    ("name", "cfg"),
    [("Flux Fill", None), *itertools.product(sorted({*TASKS} - {"Flux Fill"}), (1.0, 3.0))],
)
def test_guidance_acts_leaves_no_trace_and_keeps_rows_apart(name: str, cfg: float | None) -> None:
    family, make, arguments = TASKS[name]
    pipe = make()

    def latents(*seeds: int) -> Tensor:
        pictures = {"image": [PICTURE] * len(seeds)}
        return draw(family, pipe, seeds, cfg, **{**arguments, **pictures})

    plain = latents(3, 4)
    with SelfAttentionGuidance(0).attach(pipe):
        assert torch.equal(latents(3, 4), plain)
    with SelfAttentionGuidance(1.0, blur_sigma=2.0).attach(pipe) as handle:
        guided = latents(3, 4)
        assert handle.mask is not None
        assert handle.mask.shape == (2, 4, 6)
        assert (guided - plain).abs().max() > 1e-2
        assert (latents(3) - guided[:1]).abs().max() < 1e-4 * guided.abs().max()
    assert torch.equal(latents(3, 4), plain)


def test_only_the_denoised_part_of_packed_tokens_is_blurred() -> None:
    _, make, arguments = TASKS["Flux Kontext"]
    pipe = make()
    seen: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with SelfAttentionGuidance(1.0).attach(pipe):
        draw("Flux", pipe, (3,), 1.0, **arguments)
    whole, degraded = seen[2:4]
    assert whole.shape[1] == 48
    assert torch.equal(degraded[:, 24:], whole[:, 24:])
    assert not torch.equal(degraded[:, :24], whole[:, :24])


@pytest.mark.parametrize("branch", ["uncond", "cond"])
@pytest.mark.parametrize("name", ["Flux", "Qwen-Image"])
def test_two_calls_of_a_step_cost_no_row_more(name: str, branch: Any) -> None:
    """These pipelines keep in a variable whether a second call follows."""
    pipe = TRANSFORMERS[name].make()
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with SelfAttentionGuidance(1.0, branch=branch).attach(pipe):
        draw(name, pipe, (3,), num_inference_steps=4)
    assert sum(rows) == 4 * 3


def test_a_pipeline_that_tells_of_its_second_call_costs_no_row_more() -> None:
    pipe = chroma()
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    def cut_off(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = 3.0 if step == 0 else 1.0
        return {}

    with SelfAttentionGuidance(1.0).attach(pipe) as handle:
        draw("Chroma", pipe, (3,), num_inference_steps=4, callback_on_step_end=cut_off)
    assert handle.steps == 4
    assert len(rows) == 3 + 3 + 2 + 2


def test_two_calls_of_a_step_in_a_loop_of_ones_own() -> None:
    pipe = stable_diffusion_3()
    network, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 2, 6, 32), (2, 2, 32), (2, 4, 8, 8)
    states, pooled, x = (torch.randn(*shape, generator=generator) for shape in shapes)
    t = scheduler.timesteps[0]
    settings = {"scheduler": scheduler, **TWO_CALLS}

    def call(half: int) -> Tensor:
        return network(x, states[half], pooled[half], t.expand(2), return_dict=False)[0]

    def batch() -> Tensor:
        halves = (torch.cat([x, x]), states.flatten(0, 1), pooled.flatten(0, 1), t.expand(4))
        return network(*halves, return_dict=False)[0]

    with torch.no_grad():
        for branch in ("uncond", "cond"):
            guidance = SelfAttentionGuidance(1.0, branch=branch)
            with guidance.attach(network, **settings):
                cond, uncond = call(0), call(1)
            layout = {"scheduler": scheduler, "batch_layout": "cond_first"}
            with guidance.attach(network, **layout):
                expected = batch()
            assert (torch.cat([cond, uncond]) - expected).abs().max() < 1e-5
        with (
            SelfAttentionGuidance(1.0).attach(network, **settings),
            pytest.raises(RuntimeError, match="use branch='cond'"),
        ):
            call(0).sum()
            call(1)


@torch.no_grad()
def test_an_editing_loop_that_slices_what_two_calls_predict() -> None:
    pipe = qwen_image()
    network, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(3, mu=0.8)
    tokens, states = torch.randn(1, 48, 16), torch.randn(2, 1, 6, 32)
    shapes = [[(1, 4, 6), (1, 4, 6)]]
    is_old = Version(diffusers.__version__) < Version("0.37")
    lengths = {"txt_seq_lens": [6]} if is_old else {}

    def predict(half: int) -> tuple[Tensor, Tensor]:
        whole = network(
            tokens,
            states[half],
            torch.ones(1, 6),
            scheduler.timesteps[:1] / 1000,
            shapes,
            return_dict=False,
            **lengths,
        )[0]
        return whole[:, :24], whole[:, 24:].clone()

    plain = predict(0), predict(1)
    with SelfAttentionGuidance(1.0).attach(network, scheduler=scheduler, **TWO_CALLS) as handle:
        guided = predict(0), predict(1)
    assert handle.term is not None
    assert not handle.term[:, 24:].any()
    for (picture, reference), (before, reference_before) in zip(guided, plain, strict=True):
        assert torch.equal(picture, before + handle.term[:, :24])
        assert torch.equal(reference, reference_before)
    assert handle.term.abs().max() > 1e-2


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", ["PixArt-Sigma", "AuraFlow"])
def test_pictures_of_one_seed_are_those_drawn_alone(name: str, cfg: float, steps: int) -> None:
    """Their pipelines have no property that tells whether classifier-free guidance is on."""
    pipe = TRANSFORMERS[name].make()

    def latents(*seeds: int) -> Tensor:
        same = [torch.Generator().manual_seed(0) for _ in seeds]
        return draw(name, pipe, seeds, cfg, generator=same, num_inference_steps=steps)

    with SelfAttentionGuidance(1.0).attach(pipe):
        together = latents(3, 4)
        for number, seed in enumerate((3, 4)):
            alone = latents(seed)
            assert (together[number] - alone[0]).abs().max() < 1e-3 * alone.abs().max()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_half_precision(name: str) -> None:
    pipe = TRANSFORMERS[name].make()
    pipe.transformer.bfloat16()
    plain = draw(name, pipe, (3,), dtype=torch.bfloat16)
    with SelfAttentionGuidance(1.0).attach(pipe):
        guided = draw(name, pipe, (3,), dtype=torch.bfloat16)
    assert guided.isfinite().all()
    assert plain.dtype == guided.dtype
    assert (guided.float() - plain.float()).abs().max() > 1e-2 * plain.abs().max()


def test_blur_guidance_of_packed_latents_blurs_everywhere() -> None:
    pipe = flux()
    with BlurGuidance(1.0).attach(pipe) as handle:
        draw("Flux", pipe, (3,))
    assert handle.mask is not None
    assert handle.mask.all()


def test_sequences_of_several_denoised_pictures_are_refused() -> None:
    _, make, arguments = TASKS["Flux Fill"]
    pipe = make()
    ids = pipe._prepare_latent_image_ids

    def in_two_rows(*sizes: Any) -> Tensor:
        found = ids(*sizes)
        found[len(found) // 2 :, 0] += 1
        return found

    pipe._prepare_latent_image_ids = in_two_rows
    with SelfAttentionGuidance(1.0).attach(pipe), pytest.raises(ValueError, match="several pict"):
        draw("Flux", pipe, (3,), None, **arguments)


def test_latents_that_do_not_fit_the_patches_are_refused() -> None:
    pipe = stable_diffusion_3()
    pipe.scheduler.set_timesteps(3)
    t = pipe.scheduler.timesteps[:1]
    arguments = (torch.randn(1, 4, 9, 13), torch.randn(1, 6, 32), torch.randn(1, 32), t)
    guidance = SelfAttentionGuidance(1.0).attach(pipe.transformer, scheduler=pipe.scheduler)
    with guidance, pytest.raises(ValueError, match="latents of 9 x 13 do not fit"):
        pipe.transformer(*arguments)


def test_a_cache_over_the_steps_is_refused() -> None:
    pipe = flux()
    guidance = SelfAttentionGuidance(1.0)
    with guidance.attach(pipe), pytest.raises(ValueError, match="call its disable_cache"):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        draw("Flux", pipe, (3,))
    with pytest.raises(ValueError, match="call its disable_cache"):
        guidance.attach(pipe)


@pytest.mark.parametrize("pipeline", [MarigoldDepthPipeline, IFSuperResolutionPipeline])
def test_pipelines_whose_networks_receive_other_channels_first_are_refused(pipeline: Any) -> None:
    pipe = pipeline.__new__(pipeline)
    pipe.unet = tiny_unet()
    with pytest.raises(ValueError, match=f"{pipeline.__name__} is not supported"):
        SelfAttentionGuidance(1.0).attach(pipe)


def test_skip_layer_guidance_is_refused() -> None:
    pipe, late = stable_diffusion_3(), {"skip_layer_guidance_stop": 1.0}
    with SelfAttentionGuidance(1.0).attach(pipe), pytest.raises(ValueError, match="skip-layer"):
        draw("Stable Diffusion 3.5", pipe, (3,), skip_guidance_layers=[1], **late)


def sana() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )


def stable_cascade() -> StableCascadeUNet:
    return StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock",), ("SDCascadeResBlock",)),
    )


@pytest.mark.parametrize("make", [sana, stable_cascade])
def test_denoisers_without_softmax_attention_are_refused_by_name(make: Callable[[], Any]) -> None:
    denoiser, scheduler = make(), DPMSolverMultistepScheduler(**BETAS)
    message = f"{type(denoiser).__name__} is not supported; supported: UNet2DConditionModel"
    with pytest.raises(ValueError, match=message):
        SelfAttentionGuidance().attach(denoiser, scheduler=scheduler)
