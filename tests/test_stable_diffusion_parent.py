"""Every argument of diffusers' Stable Diffusion pipelines does in ours what it does in theirs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from self_attention_guidance import (
    SelfAttentionGuidance,
    StableDiffusionSAGPipeline,
    StableDiffusionXLSAGPipeline,
)
from test_stable_diffusion_pipeline import ip_adapter_weights
from tiny import (
    TEXT_WIDTH,
    seeded,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_pipeline,
    tiny_scheduler,
)
from tiny_xl import xl_pipeline

Case = dict[str, Any]
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dimmed(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A callback that changes what it is given, and so the picture."""
    shift = sum(tensor.mean() for tensor in tensors.values())
    return {"latents": tensors["latents"] * 0.9 + shift}


# What is given beside the usual arguments; everything but these two changes the picture.
SILENT = {"return_dict", "output_type"}
SHARED: dict[str, Case] = {
    "prompt": {"prompt": ["blue", "green"]},
    "height": {"height": 80},
    "width": {"width": 64},
    "num_inference_steps": {"num_inference_steps": 2},
    "timesteps": {"num_inference_steps": None, "timesteps": [900, 500, 10]},
    "sigmas": {"num_inference_steps": None, "sigmas": [9.0, 3.0, 0.4, 0.0]},
    "guidance_scale": {"guidance_scale": 1.0},
    "negative_prompt": {"negative_prompt": "green"},
    "num_images_per_prompt": {"num_images_per_prompt": 2},
    "eta": {"eta": 0.7},
    "generator": {"generator": 5},
    "latents": {"latents": noise(6, 1, 4, 8, 10)},
    "ip_adapter_image": {"ip_adapter_image": PICTURE},
    "ip_adapter_image_embeds": {"ip_adapter_image_embeds": [noise(9, 2, 1, TEXT_WIDTH)]},
    "output_type": {"output_type": "np"},
    "return_dict": {"return_dict": False},
    "cross_attention_kwargs": {"cross_attention_kwargs": {"scale": 0.3}},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "clip_skip": {"clip_skip": 1},
    "callback_on_step_end": {"callback_on_step_end": dimmed},
    "callback_on_step_end_tensor_inputs": {
        "callback_on_step_end": dimmed,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
}
EMBEDDED: Case = {"prompt": None, "prompt_embeds": noise(7, 1, 77, TEXT_WIDTH)}
WIDE, POOLED = (1, 77, 2 * TEXT_WIDTH), (1, TEXT_WIDTH)
XL_EMBEDDED: Case = {
    "prompt": None,
    "prompt_embeds": noise(7, *WIDE),
    "pooled_prompt_embeds": noise(8, *POOLED),
    "negative_prompt_embeds": noise(9, *WIDE),
    "negative_pooled_prompt_embeds": noise(10, *POOLED),
}
NEGATIVE: Case = {"negative_original_size": (20, 30), "negative_target_size": (50, 40)}
CASES: dict[type, dict[str, Case]] = {
    StableDiffusionSAGPipeline: {
        **SHARED,
        "prompt_embeds": EMBEDDED,
        "negative_prompt_embeds": {"negative_prompt_embeds": noise(8, 1, 77, TEXT_WIDTH)},
    },
    StableDiffusionXLSAGPipeline: {
        **SHARED,
        **dict.fromkeys([name for name in XL_EMBEDDED if name != "prompt"], XL_EMBEDDED),
        "prompt_2": {"prompt_2": "blue"},
        "negative_prompt_2": {"negative_prompt": "red", "negative_prompt_2": "blue"},
        "denoising_end": {"denoising_end": 0.5},
        "original_size": {"original_size": (20, 30)},
        "crops_coords_top_left": {"crops_coords_top_left": (3, 5)},
        "target_size": {"target_size": (50, 40)},
        **dict.fromkeys(NEGATIVE, NEGATIVE),
        "negative_crops_coords_top_left": {**NEGATIVE, "negative_crops_coords_top_left": (3, 5)},
    },
}
PARENTS: dict[type, Any] = {
    StableDiffusionSAGPipeline: StableDiffusionPipeline,
    StableDiffusionXLSAGPipeline: StableDiffusionXLPipeline,
}


def pair(cls: type, name: str) -> tuple[Any, Any]:
    """Our pipeline and diffusers', of the same components, made for one argument."""
    scheduler = tiny_scheduler(DDIMScheduler if name == "eta" else EulerDiscreteScheduler)
    make = tiny_pipeline if cls is StableDiffusionSAGPipeline else xl_pipeline
    pictures: Case = {"feature_extractor": tiny_feature_extractor()}
    pictures["image_encoder"] = tiny_image_encoder()
    ours = make(cls, scheduler=scheduler, **pictures)
    with seeded(3):
        if name.startswith("ip_adapter"):
            weights = ip_adapter_weights(ours.unet)
            ours.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
        if name == "cross_attention_kwargs":
            layers = ["to_q", "to_v"]
            ours.unet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    return ours, make(PARENTS[cls], **ours.components)


@contextmanager
def earlier_text_encoder(pipe: Any) -> Iterator[None]:
    """Until transformers 5 a text encoder had the attribute that diffusers asks for."""
    encoder = pipe.text_encoder
    own = {} if hasattr(encoder, "text_model") else {"text_model": encoder}
    vars(encoder).update(own)
    yield
    for name in own:
        del vars(encoder)[name]


def draw(pipe: Any, case: Case, **arguments: Any) -> Tensor:
    usual: Case = {"prompt": "red", "height": 64, "width": 80, "num_inference_steps": 3}
    usual |= {"output_type": "latent"}
    given = {"generator": 0, **usual, **case, **arguments}
    given["generator"] = torch.Generator().manual_seed(given["generator"])
    output = pipe(**given)
    assert isinstance(output, tuple) == (not case.get("return_dict", True))
    return torch.as_tensor(output[0])


def is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("cls", CASES)
def test_no_argument_is_left_out(cls: type) -> None:
    theirs = inspect.signature(PARENTS[cls].__call__).parameters
    assert theirs.keys() - {"self", "kwargs"} == CASES[cls].keys()


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls in CASES for name in CASES[cls]])
def test_scale_zero_is_the_parent_and_another_scale_is_attach(cls: type, name: str) -> None:
    case = CASES[cls][name]
    ours, theirs = pair(cls, name)
    usual = {"ip_adapter_image": Image.new("RGB", (32, 32))} if name.startswith("ip_ad") else {}
    with earlier_text_encoder(theirs):
        plain = draw(theirs, case)
        with SelfAttentionGuidance(0.75).attach(theirs):
            guided = draw(theirs, case)
    assert is_same(draw(ours, case, sag_scale=0), plain)
    assert is_same(draw(ours, case), guided)
    assert not is_same(guided, plain)
    if name not in SILENT:
        assert not is_same(draw(ours, usual), guided)
