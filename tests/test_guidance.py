"""A guided denoiser: what guidance changes, and what it must leave as it was."""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance, StableDiffusionSAGPipeline, detach
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline(StableDiffusionPipeline)


@pytest.fixture
def sag() -> StableDiffusionSAGPipeline:
    return tiny_pipeline(StableDiffusionSAGPipeline)


def draw(pipe: Any, seeds: tuple[int, ...] = (0,), **arguments: Any) -> Tensor:
    """Final latents, one generator per image."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    usual = {"prompt": ["red"] * len(seeds), "height": 64, "width": 64, "num_inference_steps": 3}
    return pipe(
        **{**usual, **arguments}, generator=generators, output_type="latent", return_dict=False
    )[0]


def traces(pipe: Any) -> tuple[Any, ...]:
    """Everything of a U-Net that guidance might leave behind."""
    unet = pipe.unet
    processors = {name: id(processor) for name, processor in unet.attn_processors.items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in unet.modules()]
    return processors, hooks, sorted(unet.__dict__), list(unet.state_dict())


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.supports("runs", pipeline="Stable Diffusion")
def test_attached_guidance_changes_the_picture_and_removal_restores_it(
    pipe: StableDiffusionPipeline,
) -> None:
    before, untouched = draw(pipe), traces(pipe)
    with SelfAttentionGuidance(1.0).attach(pipe) as handle:
        assert difference(draw(pipe), before) > 1e-2
    assert handle.steps == 3
    assert torch.equal(draw(pipe), before)
    assert traces(pipe) == untouched
    handle.remove()
    assert traces(pipe) == untouched


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_scale_zero_is_bit_equal_and_runs_no_second_pass(
    sag: StableDiffusionSAGPipeline, guidance_scale: float
) -> None:
    plain = StableDiffusionPipeline(**sag.components, requires_safety_checker=False)
    expected = draw(plain, guidance_scale=guidance_scale)
    assert torch.equal(draw(sag, guidance_scale=guidance_scale, sag_scale=0), expected)
    with SelfAttentionGuidance(0).attach(plain) as handle:
        assert torch.equal(draw(plain, guidance_scale=guidance_scale), expected)
    assert handle.steps == 0


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, [2, 2]), (7.5, [4, 2])])
def test_a_guided_step_costs_one_row_per_image(
    sag: StableDiffusionSAGPipeline, guidance_scale: float, rows: list[int]
) -> None:
    seen: list[int] = []
    sag.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    draw(sag, seeds=(0, 1), guidance_scale=guidance_scale)
    assert seen == rows * 3


def test_the_pipeline_is_attach_in_one_call(
    pipe: StableDiffusionPipeline, sag: StableDiffusionSAGPipeline
) -> None:
    sag.guidance = SelfAttentionGuidance(blur_sigma=2.0, threshold=0.9)
    with SelfAttentionGuidance(1.5, blur_sigma=2.0, threshold=0.9).attach(pipe):
        expected = draw(pipe)
    assert torch.equal(draw(sag, sag_scale=1.5), expected)
    assert sag.guidance_handle is not None
    assert not sag.guidance_handle.attached


@pytest.mark.parametrize(
    "setting",
    [
        {"scale": -1.0},
        {"blur_sigma": 3.0},
        {"blur_kernel_size": 3},
        {"threshold": 0.5},
        {"start": 0.5},
        {"stop": 0.5},
        {"every": 2},
        {"layer": "up_blocks.1.attentions.0.transformer_blocks.0.attn1"},
        {"branch": "cond"},
    ],
)
def test_every_setting_has_an_effect(
    pipe: StableDiffusionPipeline, setting: dict[str, Any]
) -> None:
    prompt = "a round apple on a table"
    with SelfAttentionGuidance(1.0).attach(pipe):
        usual = draw(pipe, prompt=[prompt])
    with SelfAttentionGuidance(**{"scale": 1.0, **setting}).attach(pipe):
        assert difference(draw(pipe, prompt=[prompt]), usual) > 1e-4


def test_nothing_blurred_means_nothing_added(pipe: StableDiffusionPipeline) -> None:
    before = draw(pipe, guidance_scale=1.0)
    with SelfAttentionGuidance(1.0, threshold=1e6).attach(pipe) as handle:
        assert torch.equal(draw(pipe, guidance_scale=1.0), before)
    assert handle.steps == 3
    assert handle.mask is not None
    assert not handle.mask.any()


@pytest.mark.parametrize(("start", "stop", "expected"), [(0, 0.5, 2), (0.5, 1, 2), (0.25, 0.5, 1)])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_guided_interval_counts_steps(
    pipe: StableDiffusionPipeline, scheduler: type, start: float, stop: float, expected: int
) -> None:
    pipe.scheduler = tiny_scheduler(scheduler)
    with SelfAttentionGuidance(start=start, stop=stop).attach(pipe) as handle:
        draw(pipe, num_inference_steps=4)
    assert handle.steps == expected


def test_mask_lies_on_the_denoisers_grid_and_is_not_trivial(pipe: StableDiffusionPipeline) -> None:
    with SelfAttentionGuidance().attach(pipe) as handle:
        draw(pipe, seeds=(0, 1), height=64, width=80)
    assert handle.mask is not None
    assert handle.attention is not None
    assert handle.mask.dtype == torch.bool
    assert handle.mask.shape == handle.attention.shape
    assert handle.mask.shape[0] == 2
    assert 0 < handle.mask.float().mean() < 1
    torch.testing.assert_close(handle.attention.mean((1, 2)), torch.ones(2))


@pytest.mark.supports("batch", pipeline="Stable Diffusion")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_batch_of_three_is_three_single_images(
    sag: StableDiffusionSAGPipeline, guidance_scale: float
) -> None:
    prompts = ["red", "blue apple", ""]
    together = draw(sag, seeds=(1, 2, 3), prompt=prompts, guidance_scale=guidance_scale)
    for index, prompt in enumerate(prompts):
        alone = draw(sag, (index + 1,), prompt=[prompt], guidance_scale=guidance_scale)
        assert difference(together[index : index + 1], alone) < 1e-4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_callback_leaves_no_trace(
    sag: StableDiffusionSAGPipeline, error: type[BaseException]
) -> None:
    def fail(*_: Any) -> None:
        raise error("stop here")

    before, guided, untouched = draw(sag, sag_scale=0), draw(sag), traces(sag)
    with pytest.raises(error, match="stop here"):
        draw(sag, callback_on_step_end=fail)
    assert traces(sag) == untouched
    assert torch.equal(draw(sag, sag_scale=0), before)
    assert torch.equal(draw(sag), guided)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_pass", [0, 1])
def test_a_failing_pass_leaves_no_trace(
    sag: StableDiffusionSAGPipeline, error: type[BaseException], failing_pass: int
) -> None:
    before, guided, untouched = draw(sag, sag_scale=0), draw(sag), traces(sag)
    passes = iter(range(100))

    def fail(*_: Any) -> None:
        if next(passes) == failing_pass:
            raise error("pass failed")

    failing = sag.unet.up_blocks[0].register_forward_hook(fail)
    with pytest.raises(error, match="pass failed"):
        draw(sag)
    failing.remove()
    assert traces(sag) == untouched
    assert torch.equal(draw(sag, sag_scale=0), before)
    assert torch.equal(draw(sag), guided)


def test_an_attached_handle_goes_on_after_an_interrupted_pass(
    pipe: StableDiffusionPipeline,
) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe):
        guided = draw(pipe)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        failing = pipe.unet.up_blocks[0].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
        failing.remove()
        assert torch.equal(draw(pipe), guided)


def test_attaching_twice_is_refused_and_the_first_goes_on(pipe: StableDiffusionPipeline) -> None:
    with SelfAttentionGuidance(1.25).attach(pipe) as first:
        guided = draw(pipe)
        with pytest.raises(ValueError, match=r"guided already, by .*scale=1\.25"):
            SelfAttentionGuidance().attach(pipe)
        assert torch.equal(draw(pipe), guided)
        assert first.attached
    SelfAttentionGuidance().attach(pipe).remove()


def test_a_copied_unet_is_guided_alike_until_the_handle_is_removed(
    pipe: StableDiffusionPipeline,
) -> None:
    before, original = draw(pipe), pipe.unet
    with SelfAttentionGuidance(1.0).attach(pipe) as handle:
        guided = draw(pipe)
        pipe.unet = copy.deepcopy(original)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.zero_()
        assert torch.equal(draw(pipe), guided)
        assert handle.steps == 6
    assert torch.equal(draw(pipe), before)


def test_guidance_survives_offloading_that_rehooks_after_every_picture(
    pipe: StableDiffusionPipeline,
) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe) as handle:
        expected = draw(pipe)
        for _ in range(2):
            add_hook_to_module(pipe.unet, CpuOffload(execution_device="cpu"))
            assert torch.equal(draw(pipe), expected)
            remove_hook_from_module(pipe.unet, recurse=True)
        assert torch.equal(draw(pipe), expected)
    assert handle.steps == 12


def test_guidance_can_be_detached_without_its_handle() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)
    plain = draw(pipe)
    for target in (pipe, pipe.unet):
        SelfAttentionGuidance(2.0).attach(pipe)
        assert not torch.equal(draw(pipe), plain)
        detach(target)
        assert torch.equal(draw(pipe), plain)
        assert not pipe.unet._forward_hooks
        detach(target)
    with pytest.raises(ValueError, match="target=object must be a diffusers pipeline"):
        detach(object())


def test_numbers_of_numpy_are_numbers(sag: StableDiffusionSAGPipeline) -> None:
    """They are written as Python's: JSON holds no others."""
    found = SelfAttentionGuidance(np.float32(0.5), every=np.int64(2), blur_sigma=np.float64(2.0))
    assert found.to_dict() == SelfAttentionGuidance(0.5, every=2, blur_sigma=2.0).to_dict()
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    for wrong in (np.bool_(True), np.float32("nan"), np.array([1.0])):
        with pytest.raises(ValueError, match="scale="):
            SelfAttentionGuidance(wrong)
    draw(sag, num_inference_steps=np.int64(2), sag_scale=np.float32(0.5))


def test_settings_and_guided_unet_can_be_pickled() -> None:
    guidance = SelfAttentionGuidance(0.5, blur_sigma=2.0)
    assert pickle.loads(pickle.dumps(guidance)) == guidance
    unet = tiny_unet()
    with guidance.attach(unet, scheduler=tiny_scheduler()):
        restored = pickle.loads(pickle.dumps(unet))
    assert isinstance(restored, UNet2DConditionModel)


def test_a_layer_that_is_read_by_another_kernel_raises(pipe: StableDiffusionPipeline) -> None:
    class Explicit:
        """Attention without any kernel that can be read."""

        def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

    pipe.unet.get_submodule(LAYER).set_processor(Explicit())
    untouched = traces(pipe)
    with (
        pytest.raises(RuntimeError, match=f"no attention was recorded at '{LAYER}'"),
        SelfAttentionGuidance().attach(pipe),
    ):
        draw(pipe)
    assert traces(pipe) == untouched


def test_a_layer_that_never_runs_raises(pipe: StableDiffusionPipeline) -> None:
    class Idle(type(pipe.unet.mid_block)):  # type: ignore[misc]
        def forward(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
            return sample

    pipe.unet.mid_block.__class__ = Idle
    with (
        pytest.raises(RuntimeError, match="no attention was recorded"),
        SelfAttentionGuidance().attach(pipe),
    ):
        draw(pipe)


def slice_attention(pipe: Any) -> None:
    pipe.enable_attention_slicing(1)


def plain_attention(pipe: Any) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())


def fuse_projections(pipe: Any) -> None:
    pipe.fuse_qkv_projections(vae=False)


@pytest.mark.parametrize("change", [slice_attention, plain_attention, fuse_projections])
@pytest.mark.parametrize("when", ["before", "after"])
def test_other_attention_processors_give_the_same_picture(
    pipe: StableDiffusionPipeline, change: Callable[[Any], None], when: str
) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe):
        expected = draw(pipe, seeds=(0, 1))
    if when == "before":
        change(pipe)
    with SelfAttentionGuidance(1.0).attach(pipe):
        if when == "after":
            change(pipe)
        assert difference(draw(pipe, seeds=(0, 1)), expected) < 1e-4


def test_keywords_reach_the_processor_of_the_layer_that_is_read(
    pipe: StableDiffusionPipeline,
) -> None:
    strengths: list[float] = []

    class Noting(AttnProcessor2_0):
        """Attention with a keyword of its own; diffusers drops those that it can't find."""

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            temb: Tensor | None = None,
            strength: float = 1.0,
        ) -> Tensor:
            strengths.append(strength)
            return super().__call__(attn, hidden_states, encoder_hidden_states)

    pipe.unet.get_submodule(LAYER).set_processor(Noting())
    keywords = {"cross_attention_kwargs": {"strength": 0.5}, "num_inference_steps": 1}
    with SelfAttentionGuidance().attach(pipe):
        draw(pipe, **keywords)
    assert strengths == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_single_precision(
    sag: StableDiffusionSAGPipeline, dtype: torch.dtype
) -> None:
    exact, unguided = draw(sag), draw(sag, sag_scale=0)
    half = sag.to(dtype)
    latents = draw(half)
    assert latents.dtype == dtype
    distance = (latents.float() - exact).norm() / (exact - unguided).norm()
    assert distance < 0.5


def own_loop(unet: UNet2DConditionModel, scheduler: Any, states: Tensor, cfg: str) -> Tensor:
    """A sampling loop that is not a pipeline's, with CFG in either order."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler.set_timesteps(3)
    sample = sample * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        batch = scheduler.scale_model_input(torch.cat([sample] * 2), step)
        with torch.no_grad():
            first, second = unet(batch, step, encoder_hidden_states=states).sample.chunk(2)
        uncond, cond = (first, second) if cfg == "uncond_first" else (second, first)
        sample = scheduler.step(uncond + 3 * (cond - uncond), step, sample).prev_sample
    return sample


def test_both_orders_of_a_guided_batch_agree_in_a_loop_of_ones_own() -> None:
    unet = tiny_unet()
    uncond, cond = torch.randn(2, 1, 7, unet.config.cross_attention_dim).unbind()
    results = []
    for cfg, states in (("uncond_first", (uncond, cond)), ("cond_first", (cond, uncond))):
        scheduler = tiny_scheduler(HeunDiscreteScheduler)
        with SelfAttentionGuidance(1.0).attach(unet, scheduler=scheduler, batch_layout=cfg):
            results.append(own_loop(unet, scheduler, torch.cat(states), cfg))
    unguided = own_loop(unet, tiny_scheduler(HeunDiscreteScheduler), torch.cat(states), cfg)
    assert difference(results[0], results[1]) < 1e-5
    assert difference(results[0], unguided) > 1e-3


def test_the_term_is_added_to_both_halves_alike() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(3)
    states = torch.randn(2, 7, unet.config.cross_attention_dim)
    sample, step = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), scheduler.timesteps[0]
    with torch.no_grad():
        plain = unet(sample, step, states).sample
        layout = {"batch_layout": "uncond_first"}
        with SelfAttentionGuidance(1.0).attach(unet, scheduler=scheduler, **layout):
            guided = unet(sample, step, states).sample
            as_tuple = unet(sample, step, states, return_dict=False)
    term = guided - plain
    torch.testing.assert_close(term[0], term[1], atol=1e-5, rtol=0)
    assert term.abs().max() > 1e-3
    assert torch.equal(as_tuple[0], guided)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": float("nan")}, "scale=nan must be a finite number"),
        ({"scale": float("inf")}, "scale=inf must be a finite number"),
        ({"scale": "1"}, "scale='1' must be a finite number"),
        ({"scale": True}, "scale=True must be a finite number"),
        ({"blur_sigma": -1}, "blur_sigma=-1 must be at least 0"),
        ({"blur_kernel_size": 4}, "blur_kernel_size=4 must be odd"),
        ({"blur_kernel_size": 3.0}, "blur_kernel_size=3.0 must be a whole number, at least 1"),
        ({"threshold": -0.1}, "threshold=-0.1 must be at least 0"),
        ({"start": 1.5}, "start=1.5 must be from 0 to 1"),
        ({"start": 0.5, "stop": 0.5}, "start=0.5 must be below stop=0.5"),
        ({"layer": ""}, "layer='' must be a dotted module path, or None"),
        ({"branch": "both"}, "branch='both' must be 'uncond' or 'cond'"),
    ],
)
def test_bad_settings_name_argument_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAttentionGuidance(**settings)


def test_attach_explains_what_it_refuses(pipe: StableDiffusionPipeline) -> None:
    guidance = SelfAttentionGuidance()
    with pytest.raises(ValueError, match="denoiser Linear is not supported; supported: UNet2DCond"):
        guidance.attach(torch.nn.Linear(1, 1), scheduler=tiny_scheduler())
    with pytest.raises(ValueError, match="scheduler=None must be the scheduler"):
        guidance.attach(pipe.unet)
    with pytest.raises(ValueError, match="target=str must be a diffusers pipeline"):
        guidance.attach("pipe")
    with pytest.raises(ValueError, match=r"layer 'mid_block\.attn9' is not a self-attention layer"):
        SelfAttentionGuidance(layer="mid_block.attn9").attach(pipe)
    cross = LAYER.replace("attn1", "attn2")
    with pytest.raises(ValueError, match=f"must be one of .*{LAYER}"):
        SelfAttentionGuidance(layer=cross).attach(pipe)
    with pytest.raises(ValueError, match="batch_layout='both' must be one of"):
        guidance.attach(pipe.unet, scheduler=pipe.scheduler, batch_layout="both")
    assert not pipe.unet._forward_hooks


def test_a_denoiser_called_outside_its_pipeline_needs_a_layout(
    pipe: StableDiffusionPipeline,
) -> None:
    pipe.scheduler.set_timesteps(2)
    states = torch.randn(1, 7, pipe.unet.config.cross_attention_dim)
    with (
        SelfAttentionGuidance().attach(pipe),
        pytest.raises(RuntimeError, match="attach to it with scheduler= and batch_layout="),
    ):
        pipe.unet(torch.randn(1, 4, 8, 8), pipe.scheduler.timesteps[0], states)


def test_an_odd_batch_has_no_halves() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(2)
    states = torch.randn(3, 7, unet.config.cross_attention_dim)
    with (
        SelfAttentionGuidance().attach(unet, scheduler=scheduler, batch_layout="uncond_first"),
        pytest.raises(ValueError, match="a batch of 3 has no halves"),
    ):
        unet(torch.randn(3, 4, 8, 8), scheduler.timesteps[0], states)


def test_what_a_run_kept_is_released_with_the_guidance() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(5)
    x, texts = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    kept = weakref.ref(x), weakref.ref(texts)
    handle = SelfAttentionGuidance(1.0, every=2).attach(unet, scheduler=scheduler)
    with torch.no_grad(), pytest.raises(KeyError), handle:
        unet(x, scheduler.timesteps[0], texts)
        raise KeyError("interrupted")
    assert handle.steps == 1
    del x, texts
    assert [each() for each in kept] == [None, None]
