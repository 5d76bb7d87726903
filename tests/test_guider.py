"""The guider of modular pipelines: equal to `attach`, loud, and it leaves nothing behind."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

from self_attention_guidance import (
    BlurGuidance,
    GuidanceGuider,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SelfAttentionGuider,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TokenPerturbationGuidance,
    attach,
)
from test_stable_diffusion_xl import draw as draw_xl
from test_stable_diffusion_xl import pipe as pipe
from tiny import tiny_scheduler
from tiny_transformers import (
    SIZE,
    TRANSFORMERS,
    draw,
    listed_embeddings,
    plain_embeddings,
    pooled_embeddings,
    stable_diffusion_3,
)

needs_3 = pytest.mark.skipif(
    not hasattr(modular_pipelines, "StableDiffusion3ModularPipeline"),
    reason="this version of diffusers has no modular Stable Diffusion 3",
)
SETTINGS: dict[str, Any] = {"blur_sigma": 2.0, "threshold": 1.1}
METHODS: dict[str, Any] = {
    "sag": SelfAttentionGuidance(1.5),
    "blur": BlurGuidance(1.5),
    "pag": PerturbedAttentionGuidance(1.5),
    "seg": SmoothedEnergyGuidance(1.5),
    "slg": SkipLayerGuidance(1.5),
    "tpg": TokenPerturbationGuidance(0.5, branch="uncond"),
    "several": (
        SelfAttentionGuidance(1.0, every=2),
        PerturbedAttentionGuidance(0.5, stop=0.5),
        SmoothedEnergyGuidance(0.5, branch="uncond"),
    ),
}
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


def several(guidances: Any) -> tuple[Any, ...]:
    return guidances if isinstance(guidances, tuple) else (guidances,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_xl_with_any_guidances_equals_attach(pipe: Any, guidance_scale: float, method: str) -> None:
    guidances = METHODS[method]
    plain = draw_xl(pipe, (3, 4), guidance_scale=guidance_scale)
    with attach(pipe, *several(guidances)) as handle:
        expected = draw_xl(pipe, (3, 4), guidance_scale=guidance_scale)
    guider = GuidanceGuider(guidances, guidance_scale)
    guided = draw_modular(modular_xl(pipe, guider), (3, 4))
    assert (expected - plain).abs().max() > 1e-2
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()
    assert sum(last.steps for last in guider.guidance_handles) in (1, 2)
    assert handle.steps == (7 if method == "several" else 3)
    assert torch.equal(draw_xl(pipe, (3, 4), guidance_scale=guidance_scale), plain)


@needs_3
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_stable_diffusion_3_with_any_guidances(guidance_scale: float, method: str) -> None:
    pipe, guidances = stable_diffusion_3(), METHODS[method]
    with attach(pipe, *several(guidances)):
        expected = draw("Stable Diffusion 3.5", pipe, (3, 4), guidance_scale)
    guided = draw_3(pipe, GuidanceGuider(guidances, guidance_scale))
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()


def draw_z(pipe: Any, guider: Any) -> Tensor:
    blocks = modular_pipelines.z_image.modular_blocks_z_image
    made = blocks.ZImageCoreDenoiseStep().init_pipeline()
    made.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler, guider=guider)
    embeddings = listed_embeddings([3, 4], "") | listed_embeddings([53, 54], "negative_")
    return made(
        **embeddings,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output="latents",
        **SIZE,
    )


@pytest.mark.skipif(not hasattr(modular_pipelines, "z_image"), reason="no modular Z-Image")
@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_z_image_whose_pipeline_negates_the_prediction_equals_attach(branch: Any) -> None:
    pipe, guidance = TRANSFORMERS["Z-Image"].make(), SelfAttentionGuidance(1.5, branch=branch)
    plain = draw("Z-Image", pipe, (3, 4), 3.0)
    with guidance.attach(pipe):
        expected = draw("Z-Image", pipe, (3, 4), 3.0)
    guided = draw_z(pipe, GuidanceGuider(guidance, 3.0))
    assert (expected - plain).abs().max() > 1e-2
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("branch", ["uncond", "cond"])
def test_the_tokens_of_a_reference_picture_may_be_cut_off(branch: Any) -> None:
    """The modular FLUX.2 Klein does so before it calls the guider."""
    pipe = TRANSFORMERS["FLUX.2"].make()
    pipe.scheduler.set_timesteps(3, mu=0.5)
    picture = torch.cartesian_prod(*map(torch.arange, (1, 4, 6, 1)))[None]
    ids = torch.cat([picture, picture + torch.tensor([10, 0, 0, 0])], dim=1)
    call = {
        "hidden_states": torch.randn(1, 48, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": pipe.scheduler.timesteps[:1] / 1000,
        "guidance": torch.ones(1),
        "img_ids": ids,
        "txt_ids": torch.zeros(1, 6, 4),
    }

    def prediction(tokens: int) -> Tensor:
        guider = GuidanceGuider(PerturbedAttentionGuidance(1.5, branch=branch), 5.0)
        guider.scheduler = pipe.scheduler
        guider.set_state(0, 3, pipe.scheduler.timesteps[0])
        prompts = (plain_embeddings([seed], "")["prompt_embeds"] for seed in (3, 53))
        states = guider.prepare_inputs({"text": tuple(prompts)})
        for state in states:
            guider.prepare_models(pipe.transformer)
            output = pipe.transformer(**call, encoder_hidden_states=state.text).sample
            state.noise_pred = output[:, :tokens]
            guider.cleanup_models(pipe.transformer)
        return guider(states).pred

    with torch.no_grad():
        assert torch.equal(prediction(24), prediction(48)[:, :24])


def test_classifier_free_guidance_may_end_before_the_others(pipe: Any) -> None:
    """The steps without it have one call, in which all guidances act."""
    drawn: list[Tensor] = []
    for stop in (0.0, 0.5, 1.0):
        guider = GuidanceGuider(METHODS["several"], 5.0, stop=stop)
        drawn.append(draw_modular(modular_xl(pipe, guider)))
        assert all(last.steps for last in guider.guidance_handles)
    with attach(pipe, *METHODS["several"]):
        alone, both = (draw_xl(pipe, guidance_scale=each) for each in (1.0, 5.0))
    assert (drawn[0] - alone).abs().max() < 1e-4 * alone.abs().max()
    assert (drawn[1] - both).abs().max() > 1e-2
    assert (drawn[2] - both).abs().max() < 1e-4 * both.abs().max()


@pytest.mark.parametrize("of", [lambda each: each, lambda each: each.to_dict()])
def test_a_sum_is_its_parts(of: Any) -> None:
    first, second = SelfAttentionGuidance(0.5), PerturbedAttentionGuidance(1.0)
    assert GuidanceGuider(of(first + second)).guidances == (first, second)
    assert GuidanceGuider([of(first), of(second + first)]).guidances == (first, second, first)


@pytest.mark.parametrize("guidances", [(), None, 3.0, ["pag"]])
def test_a_guider_without_guidance_is_refused(guidances: Any) -> None:
    with pytest.raises(ValueError, match=r"^guidances=.* must be a guidance or several"):
        GuidanceGuider(guidances)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("call", ["prepare_models", "cleanup_models"])
def test_a_pipeline_that_does_not_tell_of_its_calls_is_refused(
    pipe: Any, guidance_scale: float, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guider = GuidanceGuider(PerturbedAttentionGuidance(1.5), guidance_scale)
    made = modular_xl(pipe, guider)
    if call == "prepare_models":
        monkeypatch.setattr(guider, call, lambda _: None)
        message = "cond prediction was made without guidance: call prepare_models"
    else:  # another network than the one that was prepared
        prepare, other = guider.prepare_models, copy.deepcopy(pipe.unet)
        monkeypatch.setattr(guider, "prepare_models", lambda _: prepare(other))
        message = "UNet2DConditionModel was prepared for guidance but not called"
    with pytest.raises(RuntimeError, match=message):
        draw_modular(made)
    assert not pipe.unet._forward_hooks


def test_a_method_that_does_nothing_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def idle(*_: Any) -> Any:
        yield None

    monkeypatch.setattr(SkipLayerGuidance, "weaken", idle)
    with pytest.raises(RuntimeError, match=r"SkipLayerGuidance.* had no effect"):
        draw_modular(modular_xl(pipe, GuidanceGuider(SkipLayerGuidance())))


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


def test_copies_of_a_guider_may_have_a_thread_each(pipe: Any) -> None:
    guider, both_inside = GuidanceGuider(METHODS["several"], 5.0), threading.Barrier(2)
    expected = draw_modular(modular_xl(pipe, guider))  # from now on the guider has a run

    def wait(*_: object) -> None:
        both_inside.wait(10)

    copied = modular_xl(copy.deepcopy(pipe), copy.deepcopy(guider))
    with ThreadPoolExecutor(2) as pool:
        both = modular_xl(pipe, guider), copied
        hooks = [each.unet.mid_block.register_forward_pre_hook(wait) for each in both]
        found = [pool.submit(draw_modular, each) for each in both]
        assert all(torch.equal(each.result(), expected) for each in found)
        for hook in hooks:
            hook.remove()


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
    assert copy.guidance_scale == 4.0
    assert copy.scheduler is pipe.scheduler
    assert copy.guidance == SelfAttentionGuidance(0.5, stop=0.5, **SETTINGS)
    with pytest.raises(ValueError, match="blur_kernel_size=4"):
        SelfAttentionGuider(blur_kernel_size=4)


@pytest.mark.parametrize("method", METHODS)
def test_guidances_are_saved_and_loaded(method: str, tmp_path: Path) -> None:
    guider = GuidanceGuider(METHODS[method], 4.0)
    guider.save_pretrained(tmp_path)
    loaded = GuidanceGuider.from_pretrained(tmp_path)
    assert loaded.guidances == several(METHODS[method])
    assert loaded.guidance_scale == 4.0
    other = guider.new(guidances=SelfAttentionGuidance(0.5))
    assert other.guidances == (SelfAttentionGuidance(0.5),)
    assert other.guidance_scale == 4.0
    with pytest.raises(ValueError, match=r"'blurr' is not a setting of sag"):
        GuidanceGuider({"method": "sag", "blurr": 1})
