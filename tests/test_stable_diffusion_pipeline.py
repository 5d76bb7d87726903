"""The drop-in pipeline: everything that diffusers' class of that name documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from self_attention_guidance import StableDiffusionSAGPipeline
from test_guidance import difference, draw
from tiny import (
    TEXT_WIDTH,
    aligned,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_pipeline,
    tiny_safety_checker,
)


@pytest.fixture
def sag() -> StableDiffusionSAGPipeline:
    return tiny_pipeline(StableDiffusionSAGPipeline)


def guidance_effect(pipe: Any, **arguments: Any) -> Tensor:
    """Guided latents, after checking that guidance did something to them."""
    guided = draw(pipe, **arguments)
    assert difference(guided, draw(pipe, **arguments, sag_scale=0)) > 1e-4
    return guided


def test_saving_and_loading(sag: StableDiffusionSAGPipeline, tmp_path: Path) -> None:
    expected = draw(sag)
    sag.save_pretrained(tmp_path)
    for cls in (StableDiffusionSAGPipeline, StableDiffusionPipeline):
        loaded = aligned(cls.from_pretrained(tmp_path, safety_checker=None))
        loaded.set_progress_bar_config(disable=True)
        assert list(loaded.components) == list(sag.components)
        if cls is StableDiffusionSAGPipeline:
            assert torch.equal(draw(loaded), expected)
        again = StableDiffusionSAGPipeline.from_pipe(loaded)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), expected)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(sag: StableDiffusionSAGPipeline, output_type: str) -> None:
    output = sag("red", 64, 80, 2, output_type=output_type)
    assert isinstance(output, StableDiffusionPipelineOutput)
    images = output.images
    shapes: dict[str, Any] = {"np": (1, 64, 80, 3), "pt": (1, 3, 64, 80), "latent": (1, 4, 8, 10)}
    if output_type == "pil":
        assert isinstance(images[0], Image.Image)
        assert images[0].size == (80, 64)
    else:
        assert tuple(images.shape) == shapes[output_type]
    as_tuple = sag("red", 64, 80, 2, output_type=output_type, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 2


def test_embeddings_stand_for_prompts(sag: StableDiffusionSAGPipeline) -> None:
    by_text = guidance_effect(sag, prompt=["red"], negative_prompt=["blue"])
    cond, uncond = sag.encode_prompt("red", "cpu", 1, True, "blue")
    by_embedding = draw(
        sag, prompt=None, prompt_embeds=cond, negative_prompt_embeds=uncond, num_images_per_prompt=1
    )
    assert difference(by_embedding, by_text) < 1e-5
    assert difference(draw(sag), by_text) > 1e-4


def test_pictures_per_prompt_are_pictures_of_a_batch(sag: StableDiffusionSAGPipeline) -> None:
    repeated = draw(sag, (1, 2), prompt="red", num_images_per_prompt=2)
    assert difference(repeated, draw(sag, (1, 2))) < 1e-5


def test_one_generator_or_given_latents(sag: StableDiffusionSAGPipeline) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    arguments: dict[str, Any] = {"output_type": "latent", "num_inference_steps": 2, "height": 64}
    arguments |= {"width": 64, "prompt": ["red", "blue"]}
    given = sag(latents=noise, **arguments).images
    drawn = sag(generator=torch.Generator().manual_seed(4), **arguments).images
    assert torch.equal(given, drawn)


def test_eta_adds_noise_of_the_generator(sag: StableDiffusionSAGPipeline) -> None:
    noisy = guidance_effect(sag, eta=1.0)
    assert torch.equal(draw(sag, eta=1.0), noisy)
    assert difference(draw(sag), noisy) > 1e-3


def test_slicing_and_tiling_the_decoder(sag: StableDiffusionSAGPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64}

    def pictures() -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        prompts = ["red", "blue"]
        return sag(prompts, **arguments, generator=generators, output_type="np").images

    whole = pictures()
    sag.enable_vae_slicing()
    np.testing.assert_allclose(pictures(), whole, atol=1e-4)
    sag.disable_vae_slicing()
    sag.enable_vae_tiling()
    assert pictures().shape == whole.shape
    sag.disable_vae_tiling()


def test_safety_checker_blanks_what_it_flags() -> None:
    checker = tiny_safety_checker()
    sag = tiny_pipeline(
        StableDiffusionSAGPipeline,
        safety_checker=checker,
        feature_extractor=tiny_feature_extractor(),
    )
    assert sag.config.requires_safety_checker
    for threshold, flagged in ((-2.0, True), (2.0, False)):
        # An embedding is flagged if its cosine with a concept is above the concept's threshold.
        checker.concept_embeds_weights.fill_(threshold)
        checker.special_care_embeds_weights.fill_(threshold)
        output = sag("red", 64, 64, 2, output_type="np", generator=torch.manual_seed(0))
        assert output.nsfw_content_detected == [flagged]
        assert (output.images.max() == 0) == flagged


def test_clip_skip_and_guidance_rescale(sag: StableDiffusionSAGPipeline) -> None:
    usual = draw(sag)
    assert difference(guidance_effect(sag, clip_skip=1), usual) > 1e-4
    assert difference(guidance_effect(sag, guidance_rescale=0.7), usual) > 1e-4


def test_lora_scale_reaches_both_passes(sag: StableDiffusionSAGPipeline) -> None:
    without = draw(sag)
    sag.unet.add_adapter(
        LoraConfig(
            r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False
        )
    )
    full = guidance_effect(sag)
    assert difference(full, without) > 1e-3
    off = draw(sag, cross_attention_kwargs={"scale": 0.0})
    assert difference(off, without) < 1e-4
    one = draw(sag, cross_attention_kwargs={"scale": 1.0})
    assert torch.equal(one, full)


def test_textual_inversion(sag: StableDiffusionSAGPipeline, tmp_path: Path) -> None:
    before = draw(sag, prompt=["<star> red"])
    save_file({"<star>": torch.randn(TEXT_WIDTH)}, tmp_path / "learned_embeds.safetensors")
    sag.load_textual_inversion(tmp_path, token="<star>", weight_name="learned_embeds.safetensors")
    assert difference(guidance_effect(sag, prompt=["<star> red"]), before) > 1e-4


def ip_adapter_weights(unet: Any, tokens: int = 4) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP-Adapter for every cross-attention of a U-Net."""
    width = unet.config.cross_attention_dim
    layers: dict[str, Tensor] = {}
    number = 1
    for name in unet.attn_processors:
        if "attn2" in name:
            channels = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for side in ("k", "v"):
                layers[f"{number}.to_{side}_ip.weight"] = torch.randn(channels, width)
            number += 2
    projection = {
        "proj.weight": torch.randn(width * tokens, TEXT_WIDTH),
        "proj.bias": torch.zeros(width * tokens),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_ip_adapter(guidance_scale: float) -> None:
    sag = tiny_pipeline(
        StableDiffusionSAGPipeline,
        image_encoder=tiny_image_encoder(),
        feature_extractor=tiny_feature_extractor(),
    )
    usual = draw(sag, guidance_scale=guidance_scale)
    sag.load_ip_adapter(
        ip_adapter_weights(sag.unet), subfolder="", weight_name="", image_encoder_folder=None
    )
    sag.set_ip_adapter_scale(1.0)
    picture = Image.new("RGB", (32, 32), "red")
    arguments = {"ip_adapter_image": picture, "guidance_scale": guidance_scale}
    prompted = guidance_effect(sag, **arguments)
    assert difference(prompted, usual) > 1e-3
    other = draw(sag, **{**arguments, "ip_adapter_image": Image.new("RGB", (32, 32), "blue")})
    assert difference(other, prompted) > 1e-4
    pair = draw(sag, (0, 0), **arguments)
    assert difference(pair[1:], prompted) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sag_scale": float("nan")}, "sag_scale=nan must be a finite number"),
        ({"sag_scale": "much"}, "sag_scale='much' must be a finite number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number, at least 1"),
        ({"num_inference_steps": None}, "num_inference_steps=None must be a whole number"),
        ({"callback": print, "callback_steps": 0}, "callback_steps=0 must be a whole number"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"height": 63}, "63"),
    ],
)
def test_bad_arguments_are_named(
    sag: StableDiffusionSAGPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sag(**{"prompt": "red", "height": 64, "width": 64, **arguments})
    assert not sag.unet._forward_hooks
