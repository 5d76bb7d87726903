"""Perturbed-attention guidance: equal to diffusers' own pipeline, and several guidances at once."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from self_attention_guidance import (
    BlurGuidance,
    Guidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    attach,
)
from test_guidance import LAYER, difference, draw, traces
from tiny import tiny_pipeline, tiny_scheduler
from tiny_transformers import TRANSFORMERS
from tiny_transformers import draw as draw_transformer
from tiny_xl import xl_pipeline

SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
SAG = SelfAttentionGuidance(1.0)
PAG = PerturbedAttentionGuidance(2.0)


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline(StableDiffusionPipeline)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_is_what_diffusers_pipeline_draws(name: str, kind: str, guidance_scale: float) -> None:
    cls = getattr(diffusers, name)
    theirs = tiny_pipeline(StableDiffusionPAGPipeline, scheduler=tiny_scheduler(cls, kind))
    ours = tiny_pipeline(StableDiffusionPipeline, scheduler=tiny_scheduler(cls, kind))
    arguments: dict[str, Any] = {
        "seeds": (1, 2),
        "prompt": ["red", "a blue apple"],
        "guidance_scale": guidance_scale,
        "num_inference_steps": 4,
    }
    expected = draw(theirs, pag_scale=3.0, **arguments)
    plain, untouched = draw(ours, **arguments), traces(ours)
    with PerturbedAttentionGuidance(3.0).attach(ours):
        assert difference(draw(ours, **arguments), expected) < 1e-4
    assert difference(plain, expected) > 1e-2
    assert traces(ours) == untouched
    assert torch.equal(draw(ours, **arguments), plain)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, "sliced"])
def test_all_ways_to_compute_attention_are_perturbed_alike(pipe: Any, processor: Any) -> None:
    with PAG.attach(pipe):
        expected = draw(pipe)
    if processor == "sliced":
        pipe.enable_attention_slicing(1)
    else:
        pipe.unet.set_attn_processor(processor())
    with PAG.attach(pipe):
        assert difference(draw(pipe), expected) < 1e-4


def test_all_layers_of_the_mid_block_are_perturbed_by_default() -> None:
    pipe = xl_pipeline(StableDiffusionXLPipeline)
    layers = [name for name in pipe.unet.attn_processors if name.startswith("mid_block")]
    chosen = [name.removesuffix(".processor") for name in layers if "attn1" in name]
    arguments = {"height": 64, "width": 64}
    with PAG.attach(pipe):
        expected = draw(pipe, **arguments)
    with PerturbedAttentionGuidance(2.0, layers=chosen).attach(pipe):
        assert torch.equal(draw(pipe, **arguments), expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"scale": -1.0},
        {"start": 0.5},
        {"stop": 0.5},
        {"every": 2},
        {"branch": "uncond"},
        {"layers": ["up_blocks.1.attentions.0.transformer_blocks.0.attn1"]},
        {"layers": [LAYER, "up_blocks.1.attentions.0.transformer_blocks.0.attn1"]},
    ],
)
def test_every_setting_has_an_effect(pipe: Any, setting: dict[str, Any]) -> None:
    with PerturbedAttentionGuidance(1.0).attach(pipe):
        usual = draw(pipe, prompt=["a round apple"])
    with PerturbedAttentionGuidance(**{"scale": 1.0, **setting}).attach(pipe):
        assert difference(draw(pipe, prompt=["a round apple"]), usual) > 1e-4


def test_scale_zero_is_bit_equal_and_costs_nothing(pipe: Any) -> None:
    plain, rows = draw(pipe), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with PerturbedAttentionGuidance(0.0).attach(pipe):
        assert torch.equal(draw(pipe), plain)
    assert rows == [2, 2, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_weakened_pass_leaves_no_trace(pipe: Any, error: Any) -> None:
    plain, untouched = draw(pipe), traces(pipe)
    passes = itertools.count()

    def fail(*_: Any) -> None:
        if next(passes) == 1:
            raise error("pass failed")

    failing = pipe.unet.up_blocks[0].register_forward_hook(fail)
    with pytest.raises(error, match="pass failed"), PAG.attach(pipe):
        draw(pipe)
    failing.remove()
    assert traces(pipe) == untouched
    assert torch.equal(draw(pipe), plain)


def test_what_it_refuses(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"layer 'mid\.7' is not a self-attention layer"):
        PerturbedAttentionGuidance(layers=["mid.7"]).attach(pipe)
    for layers in ([], [""], [3], ""):
        with pytest.raises(ValueError, match=r"layers=.* must be a dotted module"):
            PerturbedAttentionGuidance(layers=layers)
    assert not pipe.unet._forward_hooks


# Several guidances


def by_hand(pipe: Any, guidance_scale: float) -> Tensor:
    """SAG + PAG with DDIM, written out, each term from a network that is guided by one alone."""
    scheduler, unet = pipe.scheduler, pipe.unet
    uncond_cond = pipe.encode_prompt("red", "cpu", 1, True, "")[::-1]
    texts = torch.cat(list(uncond_cond))
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"scheduler": scheduler, "batch_layout": "uncond_first"}
    for t in scheduler.timesteps:
        batch = torch.cat([x, x])
        plain = unet(batch, t, texts).sample
        terms = 0
        for guidance in (SAG, PAG):
            with guidance.attach(unet, **settings):
                terms = terms + unet(batch, t, texts).sample - plain
        uncond, cond = (plain + terms).chunk(2)
        x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [3.0, 7.5])
def test_sag_and_pag_together_are_the_sum_by_hand(pipe: Any, guidance_scale: float) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    expected = by_hand(pipe, guidance_scale)
    plain = draw(pipe, **arguments)
    with attach(pipe, SAG, PAG) as handle:
        found = draw(pipe, **arguments)
    assert handle.steps == 8
    assert handle.mask is not None and handle.attention is not None
    assert difference(found, expected) < 1e-4
    for alone in (SAG, PAG):
        with alone.attach(pipe):
            assert difference(draw(pipe, **arguments), found) > 1e-2
    assert torch.equal(draw(pipe, **arguments), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_order_is_irrelevant(pipe: Any, guidance_scale: float) -> None:
    found = []
    for order in ((SAG, PAG), (PAG, SAG)):
        with attach(pipe, *order):
            found.append(draw(pipe, guidance_scale=guidance_scale))
    assert torch.equal(*found)


def test_each_has_its_own_window_and_rate(pipe: Any) -> None:
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    late = SelfAttentionGuidance(1.0, start=0.5)
    often = PerturbedAttentionGuidance(2.0, every=3, stop=0.75)
    with attach(pipe, late, often) as handle:
        draw(pipe, num_inference_steps=8)
    # Both halves at each step, perturbed at 0 and 3, blurred at 4 to 7.
    assert rows == [2, 1, 2, 2, 2, 1, *[2, 1] * 4]
    assert handle.steps == 6


def test_one_that_is_off_changes_nothing(pipe: Any) -> None:
    with SAG.attach(pipe):
        expected = draw(pipe)
    with attach(pipe, SAG, PerturbedAttentionGuidance(0.0)):
        assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("name", ["Flux", "Chroma"])
@pytest.mark.parametrize("branches", [("uncond", "cond"), ("cond", "uncond"), ("uncond", "uncond")])
def test_several_guidances_of_two_calls_a_step(name: str, branches: Any) -> None:
    pipe = TRANSFORMERS[name].make()
    guidances = [
        SelfAttentionGuidance(1.0, branch=branches[0]),
        BlurGuidance(0.5, branch=branches[1], blur_sigma=2.0),
    ]
    singles = []
    for guidance in guidances:
        with guidance.attach(pipe) as handle:
            draw_transformer(name, pipe, (3,), 3.0, num_inference_steps=1)
        singles.append(handle.term)
    with attach(pipe, *guidances) as handle:
        draw_transformer(name, pipe, (3,), 3.0, num_inference_steps=1)
    assert handle.term is not None
    assert difference(handle.term, singles[0] + singles[1]) < 1e-4


def test_attaching_several_is_refused_where_one_is_there_already(pipe: Any) -> None:
    message = "guided already, by SelfAttentionGuidance.* and PerturbedAttentionGuidance"
    with attach(pipe, SAG, PAG), pytest.raises(ValueError, match=message):
        PAG.attach(pipe)
    for wrong in ((), ("sag",), (SelfAttentionGuidance,), ([SAG, PAG],), (None,)):
        with pytest.raises(ValueError, match=r"guidances=.* must be guidances, one after"):
            attach(pipe, *wrong)
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("guidance", [SAG, PAG, BlurGuidance(0.3, every=2)])
def test_settings_are_plain_data_and_back(guidance: Guidance) -> None:
    settings = guidance.to_dict()
    assert settings["method"] == guidance.method
    assert Guidance.from_dict(settings) == guidance
    changed = PerturbedAttentionGuidance(layers=["a.b", "c"]).to_dict()
    assert changed["layers"] == ["a.b", "c"]
    assert Guidance.from_dict(changed) == PerturbedAttentionGuidance(layers=("a.b", "c"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "method=None must be one of blur, pag, sag, seg, slg, tpg"),
        ({"method": "cfg"}, "method='cfg' must be one of"),
        ({"method": "pag", "blur_sigma": 2}, "'blur_sigma' is not a setting of pag: scale, start"),
        ({"method": "sag", "scale": "much"}, "scale='much' must be a finite number"),
    ],
)
def test_settings_that_are_wrong_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance.from_dict(settings)


@pytest.mark.parametrize("cls", [SelfAttentionGuidance, BlurGuidance, PerturbedAttentionGuidance])
def test_every_method_has_a_fast_preset(pipe: Any, cls: Any) -> None:
    plain = draw(pipe, num_inference_steps=25)
    with cls.fast().attach(pipe) as handle:
        guided = draw(pipe, num_inference_steps=25)
    assert handle.steps == 4
    assert difference(guided, plain) > 1e-2
    assert cls.fast(2.0, every=5).to_dict() == {**cls.fast().to_dict(), "scale": 2.0, "every": 5}
