"""What a batch holds: pictures, or the halves of classifier-free guidance; named, or refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    SemanticStableDiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import Tensor
from torch.utils._pytree import tree_map

from self_attention_guidance import SelfAttentionGuidance, register_batch_arguments
from self_attention_guidance.denoiser import families
from tiny import tiny_pipeline, tiny_scheduler, tiny_unet
from tiny_pixels import tiny_unet as pixel_unet

GUIDANCE = SelfAttentionGuidance(2.0)
AMBIGUOUS = "attach with batch_layout='single', 'uncond_first' or 'cond_first'"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def own_loop(predict: Callable[[Any, Tensor, Any], Tensor], **layout: Any) -> Tensor:
    """A loop of one's own; `predict(unet, x, t)` makes its calls of the denoiser."""
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(5)
    x = randn(1, 4, 8, 8)
    with GUIDANCE.attach(unet, scheduler=scheduler, **layout), torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(predict(unet, x, t), t, x).prev_sample
    return x


TEXTS = randn(2, 7, 32, seed=1)


def in_a_batch(unet: Any, x: Tensor, t: Any) -> Tensor:
    uncond, cond = unet(torch.cat([x, x]), t, TEXTS).sample.chunk(2)
    return uncond + 5 * (cond - uncond)


def interleaved(unet: Any, x: Tensor, t: Any) -> Tensor:
    out = unet(torch.cat([x, x + 1]).repeat_interleave(2, 0), t, TEXTS.repeat(2, 1, 1)).sample
    return out[:1] + 5 * (out[1:2] - out[:1])


def three_conditions(unet: Any, x: Tensor, t: Any) -> Tensor:
    return unet(torch.cat([x] * 3), t, randn(3, 7, 32, seed=2)).sample.mean(0, keepdim=True)


def in_two_calls(unet: Any, x: Tensor, t: Any) -> Tensor:
    uncond, cond = (unet(x, t, text[None]).sample for text in TEXTS)
    return uncond + 5 * (cond - uncond)


def the_other_way_round(unet: Any, x: Tensor, t: Any) -> Tensor:
    cond, uncond = (unet(x, t, text[None]).sample for text in TEXTS.flip(0))
    return uncond + 5 * (cond - uncond)


@pytest.mark.parametrize("predict", [in_a_batch, interleaved, three_conditions])
def test_a_loop_that_repeats_a_sample_with_several_conditions_must_say_why(predict: Any) -> None:
    with pytest.raises(ValueError, match=AMBIGUOUS):
        own_loop(predict)


def with_a_longer_text(unet: Any, x: Tensor, t: Any) -> Tensor:
    uncond, cond = (unet(x, t, text).sample for text in (TEXTS[:1], TEXTS.reshape(1, 14, 32)))
    return uncond + 5 * (cond - uncond)


@pytest.mark.parametrize("predict", [in_two_calls, the_other_way_round, with_a_longer_text])
def test_two_calls_of_a_step_must_be_given(predict: Any) -> None:
    with pytest.raises(ValueError, match="called twice at one step with the same sample and two"):
        own_loop(predict)


def test_all_ways_of_classifier_free_guidance_draw_one_picture() -> None:
    expected = own_loop(in_a_batch, batch_layout="uncond_first")
    for predict, layout in (
        (in_two_calls, "uncond_call_first"),
        (the_other_way_round, "cond_call_first"),
    ):
        found = own_loop(predict, batch_layout=layout)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def image_prompts(unet: Any) -> dict[str, Any]:
    """An IP-Adapter with an empty prompt: only the image differs between the halves."""
    for name, layer in unet.named_modules():
        if name.endswith("attn2"):
            layer.set_processor(IPAdapterAttnProcessor2_0(layer.query_dim, 32))
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(32, 32, 4)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return {"added_cond_kwargs": {"image_embeds": [randn(2, 1, 32)]}}


def control(_: Any) -> dict[str, Any]:
    return {
        "mid_block_additional_residual": randn(2, 64, 4, 4) * torch.tensor([0, 1]).view(2, 1, 1, 1)
    }


def a_picture_beside(_: Any) -> dict[str, Any]:
    return {"sample": torch.stack([torch.zeros(4, 8, 8), randn(4, 8, 8)])}


@pytest.mark.parametrize("differing", [image_prompts, control, a_picture_beside])
@pytest.mark.parametrize("calls", [1, 2])
def test_halves_with_one_text_may_differ_in_any_other_condition(
    differing: Callable[[Any], dict[str, Any]], calls: int
) -> None:
    unet = tiny_unet(in_channels=8 if differing is a_picture_beside else 4)
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(2)
    text, arguments = TEXTS[:1].repeat(2, 1, 1), differing(unet)
    beside = arguments.pop("sample", torch.zeros(2, 0, 8, 8))

    @torch.no_grad()
    def predict(layout: Any) -> Tensor:
        x = torch.cat([randn(1, 4, 8, 8).repeat(2, 1, 1, 1), beside], 1)
        with GUIDANCE.attach(unet, scheduler=scheduler, batch_layout=layout):
            given = [x, text, arguments]
            rows = [tree_map(operator.itemgetter(slice(n, n + 1)), given) for n in range(2)]
            return torch.cat(
                [
                    unet(x, scheduler.timesteps[0], text, **more).sample
                    for x, text, more in (rows if calls == 2 else [given])
                ]
            )

    with pytest.raises(ValueError, match=AMBIGUOUS if calls == 1 else "called twice at one step"):
        predict(None)
    predict("uncond_first" if calls == 1 else "uncond_call_first")


def test_pictures_of_one_seed_and_one_condition_need_no_word() -> None:
    def twice(unet: Any, x: Tensor, t: Any) -> Tensor:
        return unet(torch.cat([x, x]), t, TEXTS[:1].repeat(2, 1, 1)).sample[:1]

    def once(unet: Any, x: Tensor, t: Any) -> Tensor:
        return unet(x, t, TEXTS[:1]).sample

    expected = own_loop(once)
    assert (own_loop(twice) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_class_conditions_of_a_pixel_network_are_looked_at_too() -> None:
    unet, scheduler = pixel_unet(num_class_embeds=3), tiny_scheduler()
    scheduler.set_timesteps(3)
    x = randn(1, 3, unet.config.sample_size, unet.config.sample_size)
    guided = GUIDANCE.attach(unet, scheduler=scheduler)
    with guided, torch.no_grad(), pytest.raises(ValueError, match=AMBIGUOUS):
        unet(torch.cat([x, x]), scheduler.timesteps[0], torch.tensor([0, 1]))


def draw(pipe: Any, **arguments: Any) -> Tensor:
    usual = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}
    return pipe("red", generator=torch.Generator().manual_seed(0), **{**usual, **arguments}).images


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_panorama_of_one_view_is_the_picture(guidance_scale: float) -> None:
    """Its property says that classifier-free guidance is off, whatever its call does."""
    single, panorama = (
        tiny_pipeline(cls) for cls in (StableDiffusionPipeline, StableDiffusionPanoramaPipeline)
    )
    with GUIDANCE.attach(single):
        expected = draw(single, guidance_scale=guidance_scale)
    with GUIDANCE.attach(panorama):
        found = draw(panorama, guidance_scale=guidance_scale)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("view_batch_size", [1, 2])
def test_a_panorama_of_many_views_is_guided_or_refused(view_batch_size: int) -> None:
    pipe = tiny_pipeline(StableDiffusionPanoramaPipeline)
    arguments: dict[str, Any] = {"width": 576, "view_batch_size": view_batch_size}
    plain = draw(pipe, **arguments)
    with GUIDANCE.attach(pipe):
        if view_batch_size == 2:
            with pytest.raises(ValueError, match=r"hold different samples.*view_batch_size=1"):
                draw(pipe, **arguments)
        else:
            assert not torch.equal(draw(pipe, **arguments), plain)


def test_the_views_of_a_panorama_are_one_run() -> None:
    pipe = tiny_pipeline(StableDiffusionPanoramaPipeline)
    arguments: dict[str, Any] = {"width": 576, "num_inference_steps": 4}
    with SelfAttentionGuidance(2.0, every=4).attach(pipe):
        with pytest.raises(RuntimeError, match=r"called 2 times a step.*use every=1"):
            draw(pipe, **arguments)
        draw(pipe, num_inference_steps=4)  # one view
    for settings in ({"stop": 0.5}, {"noise_to": 1.0}):
        with SelfAttentionGuidance(2.0, **settings).attach(pipe) as handle:
            draw(pipe, **arguments)
        assert handle.steps == 4


def test_pictures_of_one_seed_with_two_prompts_are_those_drawn_alone() -> None:
    pipe = tiny_pipeline(StableDiffusionPipeline)

    def latents(prompts: list[str], guidance_scale: float) -> Tensor:
        seeds = [torch.Generator().manual_seed(0) for _ in prompts]
        arguments = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}
        return pipe(prompts, generator=seeds, guidance_scale=guidance_scale, **arguments).images

    with GUIDANCE.attach(pipe):
        for guidance_scale in (1.0, 5.0):
            together = latents(["red", "a blue bird"], guidance_scale)
            for number, prompt in enumerate(["red", "a blue bird"]):
                alone = latents([prompt], guidance_scale)
                assert (together[number] - alone[0]).abs().max() < 1e-4 * alone.abs().max()


class OwnCfg(StableDiffusionPipeline):
    """A pipeline of a user's own, which tells nobody that it has classifier-free guidance."""

    @torch.no_grad()
    def __call__(self, steps: int = 4, **_: Any) -> Any:  # type: ignore[override]
        self.scheduler.set_timesteps(steps)
        x = randn(1, 4, 8, 8)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(in_a_batch(self.unet, x, t), t, x).prev_sample
        return x

    @property
    def do_classifier_free_guidance(self) -> bool:
        return False


class WithTheEncoder(OwnCfg):
    """Uses the parent for its text only; another call of the parent left its settings."""

    def __call__(self, steps: int = 4, **arguments: Any) -> Any:  # type: ignore[override]
        super().encode_prompt("red", "cpu", 1, True)
        self._guidance_scale = 1.0
        return OwnCfg.__call__(self, steps, **arguments)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return StableDiffusionPipeline.do_classifier_free_guidance.fget(self)  # type: ignore[attr-defined]


class WithTheVariable(OwnCfg):
    """Named as in diffusers; but the order of the halves could still be any."""

    @torch.no_grad()
    def __call__(self, steps: int = 4, **_: Any) -> Any:  # type: ignore[override]
        self.scheduler.set_timesteps(steps)
        x = randn(1, 4, 8, 8)
        do_classifier_free_guidance = True
        for t in self.scheduler.timesteps if do_classifier_free_guidance else ():
            x = self.scheduler.step(in_a_batch(self.unet, x, t), t, x).prev_sample
        return x


@pytest.mark.parametrize("pipeline", [OwnCfg, WithTheEncoder, WithTheVariable])
def test_halves_in_a_loop_that_is_not_diffusers_own_must_be_given(pipeline: Any) -> None:
    pipe = tiny_pipeline(pipeline)
    with GUIDANCE.attach(pipe), pytest.raises(ValueError, match=AMBIGUOUS):
        pipe()
    pipe.unet, pipe.scheduler = tiny_unet(), tiny_scheduler()
    with GUIDANCE.attach(pipe, batch_layout="uncond_first"):
        assert torch.equal(pipe(steps=5), own_loop(in_a_batch, batch_layout="uncond_first"))


@pytest.mark.parametrize(
    "pipeline",
    [
        SemanticStableDiffusionPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionLatentUpscalePipeline,
    ],
)
def test_pipelines_that_are_not_known_are_refused_when_attaching(pipeline: Any) -> None:
    pipe = pipeline.__new__(pipeline)
    pipe.unet = tiny_unet()
    with pytest.raises(ValueError, match=f"{pipeline.__name__} is not supported; if its network"):
        GUIDANCE.attach(pipe)


def test_pipelines_with_perturbed_attention_of_their_own_are_refused_when_attaching() -> None:
    pipe = tiny_pipeline(StableDiffusionPAGPipeline)
    with pytest.raises(ValueError, match="attach PerturbedAttentionGuidance to"):
        GUIDANCE.attach(pipe)
    assert not pipe.unet._forward_hooks


def test_a_user_s_subclass_of_a_known_pipeline_is_known() -> None:
    class Mine(StableDiffusionPipeline):
        pass

    pipe = tiny_pipeline(Mine)
    plain = draw(pipe)
    with GUIDANCE.attach(pipe):
        assert not torch.equal(draw(pipe), plain)


def test_tensors_are_cut_by_their_name_and_not_by_their_length() -> None:
    """Two rows of classifier-free guidance, and a keyword that happens to hold two numbers."""
    pipe = tiny_pipeline(StableDiffusionPipeline)
    seen: list[Any] = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs.get("cross_attention_kwargs") or {}).get("w")),
        with_kwargs=True,
    )
    with GUIDANCE.attach(pipe):
        draw(pipe, num_inference_steps=1, cross_attention_kwargs={"w": torch.ones(2)})
    assert [len(each) for each in seen] == [2, 2]


def test_arguments_of_a_network_of_ones_own_are_cut_when_they_are_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    pipe = tiny_pipeline(StableDiffusionPipeline)
    seen: list[Any] = []
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs.get("cross_attention_kwargs") or {}).get("w")),
        with_kwargs=True,
    )
    register_batch_arguments("UNet2DConditionModel", "cross_attention_kwargs.w")
    with GUIDANCE.attach(pipe):
        draw(pipe, num_inference_steps=1, cross_attention_kwargs={"w": torch.arange(2.0)})
    assert [each.tolist() for each in seen] == [[0, 1], [0]]
    with pytest.raises(ValueError, match="denoiser Linear is not supported"):
        register_batch_arguments("Linear", "x")


def test_a_named_argument_with_other_rows_is_refused() -> None:
    class Lenient(UNet2DConditionModel):
        """Takes any number of masks."""

        def forward(self, *args: Any, encoder_attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    unet, scheduler = tiny_unet(), tiny_scheduler()
    unet.__class__ = Lenient
    scheduler.set_timesteps(3)
    x, texts = randn(1, 4, 8, 8).repeat(2, 1, 1, 1), randn(2, 7, 32)
    guided = GUIDANCE.attach(unet, scheduler=scheduler, batch_layout="uncond_first")
    message = "encoder_attention_mask holds 4 rows for a batch of 2 pictures"
    with guided, torch.no_grad(), pytest.raises(ValueError, match=message):
        unet(x, scheduler.timesteps[0], texts, encoder_attention_mask=torch.ones(4, 7))


def test_each_picture_may_have_its_own_timestep_where_levels_are_of_timesteps() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler()
    scheduler.set_timesteps(5)
    x, texts = randn(2, 4, 8, 8), randn(2, 7, 32)
    t = scheduler.timesteps[[1, 3]]
    with GUIDANCE.attach(unet, scheduler=scheduler), torch.no_grad():
        together = unet(x, t, texts).sample
        alone = [unet(x[i : i + 1], t[i], texts[i : i + 1]).sample for i in range(2)]
    assert (together - torch.cat(alone)).abs().max() < 1e-4


def test_each_picture_may_not_have_its_own_timestep_where_levels_are_of_steps() -> None:
    unet, scheduler = tiny_unet(), tiny_scheduler(EulerDiscreteScheduler)
    scheduler.set_timesteps(5)
    x, texts = randn(2, 4, 8, 8), randn(2, 7, 32)
    guided = GUIDANCE.attach(unet, scheduler=scheduler)
    with guided, torch.no_grad(), pytest.raises(ValueError, match="have several timesteps"):
        unet(x, scheduler.timesteps[:2], texts)
