"""Guidance together with what else diffusers can do to a picture, against the formula by hand."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from packaging.version import Version
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reference import blur, nearest
from self_attention_guidance import SelfAttentionGuidance
from test_guidance import difference
from test_guidance import draw as draw_in_steps
from test_stable_diffusion_pipeline import ip_adapter_weights
from tiny import (
    TEXT_WIDTH,
    seeded,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_pipeline,
    tiny_scheduler,
    tiny_tokenizer,
)
from tiny_xl import xl_pipeline

# peft says so of every second adapter
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

CPU = torch.device("cpu")
GUIDANCE = SelfAttentionGuidance(1.0, blur_sigma=2.0)
RED, BLUE = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
LEFT, RIGHT = Image.new("L", (64, 64)), Image.new("L", (64, 64))
LEFT.paste(255, (0, 0, 32, 64))
RIGHT.paste(255, (32, 0, 64, 64))


def sd() -> Any:
    encoder, extractor = tiny_image_encoder(), tiny_feature_extractor()
    parts = {"image_encoder": encoder, "feature_extractor": extractor}
    return tiny_pipeline(StableDiffusionPipeline, **parts)


def xl() -> Any:
    encoder, extractor = tiny_image_encoder(), tiny_feature_extractor()
    parts = {"image_encoder": encoder, "feature_extractor": extractor}
    return xl_pipeline(StableDiffusionXLPipeline, scheduler=tiny_scheduler(), **parts)


def draw(pipe: Any, **arguments: Any) -> Tensor:
    return draw_in_steps(pipe, **{"num_inference_steps": 2, **arguments})


@contextmanager
def guided_by_hand(pipe: Any, branch: str = "uncond") -> Iterator[None]:
    # the formula for classifier-free guidance and DDIM in the place of the U-Net's forward pass
    unet, network = pipe.unet, pipe.unet.forward

    def forward(x: Tensor, timestep: Any, encoder_hidden_states: Tensor, **others: Any) -> Any:
        added = others.pop("added_cond_kwargs", None) or {}
        half = len(x) // 2
        rows = slice(0, half) if branch == "uncond" else slice(half, None)

        def predict(x: Tensor, rows: slice) -> Tensor:
            texts, conditions = encoder_hidden_states[rows], rows_of(added, rows)
            return network(x, timestep, texts, added_cond_kwargs=conditions, **others)[0]

        with attention_seen(unet) as sides:
            whole = predict(x, slice(None))
        received = attention_received(sides)[rows].unflatten(1, (x.shape[2] // 2, x.shape[3] // 2))
        mask = nearest(received > 1, *x.shape[2:])[:, None]
        level = pipe.scheduler.alphas_cumprod[timestep].double()
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
        x0 = (x[rows] - sigma * whole[rows]) / alpha
        degraded = alpha * torch.where(mask, blur(x0, sigma=2.0), x0) + sigma * whole[rows]
        term = whole[rows] - predict(degraded.float(), rows)
        return (whole + torch.cat([term, term]),)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


def rows_of(added: dict[str, Any], rows: slice) -> dict[str, Any]:
    # conditions beside the prompt; those of IP-Adapters are a list, one tensor each
    return {
        name: [part[rows] for part in value] if isinstance(value, list) else value[rows]
        for name, value in added.items()
    }


@contextmanager
def attention_seen(unet: Any) -> Iterator[dict[str, Tensor]]:
    # (batch, heads, positions, channels), of the layer that is read
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    sides: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        sides[name] = output.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    hooks = [
        side.register_forward_hook(lambda _, args, output, name=name: note(name, output))
        for name, side in {"query": layer.to_q, "key": layer.to_k}.items()
    ]
    yield sides
    for hook in hooks:
        hook.remove()


def attention_received(sides: dict[str, Tensor]) -> Tensor:
    query, key = sides["query"], sides["key"]
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
    return weights.mean(1).sum(1)


def add_lora(unet: Any, name: str, seed: int) -> None:
    targets = ["to_q", "to_k", "to_v"]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    with seeded(seed):
        unet.add_adapter(config, name)


def lora_at_half_scale(pipe: Any, folder: Path) -> dict[str, Any]:
    add_lora(pipe.unet, "style", 1)
    return {"cross_attention_kwargs": {"scale": 0.5}}


def weighted_loras(pipe: Any, folder: Path) -> dict[str, Any]:
    add_lora(pipe.unet, "style", 1)
    add_lora(pipe.unet, "object", 2)
    pipe.set_adapters(["style", "object"], [0.8, -0.4])
    return {}


def lora_of_a_file(pipe: Any, folder: Path) -> dict[str, Any]:
    source = copy.deepcopy(pipe.unet)
    add_lora(source, "default", 1)
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(source))
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    return {}


def textual_inversion(pipe: Any, folder: Path) -> dict[str, Any]:
    with seeded(1):
        save_file({"<star>": torch.randn(TEXT_WIDTH)}, folder / "learned.safetensors")
    pipe.tokenizer = tiny_tokenizer.__wrapped__()  # the tests share one
    pipe.load_textual_inversion(folder, token="<star>", weight_name="learned.safetensors")
    return {"prompt": ["red"], "negative_prompt": ["<star>"]}


def ip_adapters(pipe: Any, count: int) -> None:
    with seeded(1):
        weights = [ip_adapter_weights(pipe.unet) for _ in range(count)]
    nowhere = {"subfolder": [""] * count, "weight_name": [""] * count}
    pipe.load_ip_adapter(weights, **nowhere, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([1.0] * count)


def ip_adapter(pipe: Any, folder: Path) -> dict[str, Any]:
    ip_adapters(pipe, 1)
    return {"ip_adapter_image": RED}


def ip_adapter_with_masks(pipe: Any, folder: Path) -> dict[str, Any]:
    ip_adapters(pipe, 1)
    masks = IPAdapterMaskProcessor().preprocess([LEFT, RIGHT], height=64, width=64)
    masks = masks.reshape(1, 2, 64, 64)
    return {
        "ip_adapter_image": [[RED, BLUE]],
        "cross_attention_kwargs": {"ip_adapter_masks": [masks]},
    }


def two_ip_adapters_with_masks(pipe: Any, folder: Path) -> dict[str, Any]:
    ip_adapters(pipe, 2)
    masks = IPAdapterMaskProcessor().preprocess([LEFT, RIGHT], height=64, width=64)
    return {
        "ip_adapter_image": [RED, BLUE],
        "cross_attention_kwargs": {"ip_adapter_masks": list(masks.unsqueeze(1))},
    }


def two_masks_in_one_tensor(pipe: Any, folder: Path) -> dict[str, Any]:
    # the older form, (adapters, 1, height, width), which is no batch of two
    arguments = two_ip_adapters_with_masks(pipe, folder)
    masks = arguments["cross_attention_kwargs"]["ip_adapter_masks"]
    return {**arguments, "cross_attention_kwargs": {"ip_adapter_masks": torch.cat(masks)}}


def freeu(pipe: Any, folder: Path) -> dict[str, Any]:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    return {}


def guidance_rescale(pipe: Any, folder: Path) -> dict[str, Any]:
    return {"guidance_rescale": 0.7}


def clip_skip(pipe: Any, folder: Path) -> dict[str, Any]:
    return {"clip_skip": 1}


def sizes(pipe: Any, folder: Path) -> dict[str, Any]:
    return {"original_size": (32, 48), "negative_original_size": (512, 256)}


def callback_on(name: str) -> Callable[[Any, Path], dict[str, Any]]:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        return {name: tensors[name].flip(-1)}

    arguments = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": [name],
    }
    return lambda pipe, folder: arguments


Feature = tuple[Callable[[], Any], Callable[[Any, Path], dict[str, Any]]]
FEATURES: dict[str, Feature] = {
    "LoRA at half scale": (sd, lora_at_half_scale),
    "weighted LoRAs": (sd, weighted_loras),
    "LoRA of a file": (sd, lora_of_a_file),
    "LoRA at half scale, XL": (xl, lora_at_half_scale),
    "textual inversion": (sd, textual_inversion),
    "IP-Adapter": (sd, ip_adapter),
    "IP-Adapter, XL": (xl, ip_adapter),
    "IP-Adapter with masks": (sd, ip_adapter_with_masks),
    "two IP-Adapters with masks": (sd, two_ip_adapters_with_masks),
    "two IP-Adapters with masks in one tensor": (sd, two_masks_in_one_tensor),
    "FreeU": (sd, freeu),
    "FreeU, XL": (xl, freeu),
    "guidance rescale": (sd, guidance_rescale),
    "clip skip, XL": (xl, clip_skip),
    "sizes, XL": (xl, sizes),
    "callback on latents": (sd, callback_on("latents")),
    "callback on prompts": (sd, callback_on("prompt_embeds")),
    "callback on pooled prompts, XL": (xl, callback_on("add_text_embeds")),
}


# what an IP-Adapter makes of no picture is nothing, so that only the conditional branch shows it
BRANCHES = [(name, "cond" if "IP-Adapter" in name else "uncond") for name in FEATURES]


@pytest.mark.parametrize(("feature", "branch"), [*BRANCHES, ("IP-Adapter", "uncond")])
def test_both_passes_have_what_else_is_on(feature: str, branch: Any, tmp_path: Path) -> None:
    build, prepare = FEATURES[feature]
    pipe = build()
    without = draw(pipe)
    with SelfAttentionGuidance(1.0, blur_sigma=2.0, branch=branch).attach(pipe):
        arguments = prepare(pipe, tmp_path)
        guided = draw(pipe, **arguments)
    plain = draw(pipe, **arguments)
    with guided_by_hand(pipe, branch):
        expected = draw(pipe, **arguments)
    assert difference(plain, without) > 1e-3
    assert difference(guided, plain) > 1e-2
    assert difference(guided, expected) < 1e-4
    assert torch.equal(draw(pipe, **arguments), plain)


Switch = tuple[Callable[[Any, Path], dict[str, Any]], Callable[[Any], None]]
SWITCHES: dict[str, Switch] = {
    "LoRA": (lora_of_a_file, lambda pipe: pipe.unload_lora_weights()),
    "IP-Adapter": (ip_adapter, lambda pipe: pipe.unload_ip_adapter()),
    "FreeU": (freeu, lambda pipe: pipe.disable_freeu()),
    "fused projections": (
        lambda pipe, folder: pipe.fuse_qkv_projections() or {},
        lambda pipe: pipe.unfuse_qkv_projections(),
    ),
    "attention backend": (
        lambda pipe, folder: pipe.unet.set_attention_backend("native") or {},
        lambda pipe: pipe.unet.reset_attention_backend(),
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_switched_off_again_leaves_guidance_as_it_was(switch: str, tmp_path: Path) -> None:
    on, off = SWITCHES[switch]
    pipe = sd()
    plain = draw(pipe)
    with GUIDANCE.attach(pipe):
        guided = draw(pipe)
        arguments = on(pipe, tmp_path)
        meanwhile = draw(pipe, **arguments)
        off(pipe)
        assert torch.equal(draw(pipe), guided)
    same = switch in ("fused projections", "attention backend")
    assert (difference(meanwhile, guided) < 1e-4) == same
    assert torch.equal(draw(pipe), plain)


def offload_leaves(pipe: Any) -> None:
    # what `enable_sequential_cpu_offload` does to a network; accelerate's own weights, which are
    # no parameters, fail where the device is the CPU
    cpu_offload(pipe.unet, CPU, state_dict=dict(pipe.unet.named_parameters()))
    assert next(pipe.unet.parameters()).is_meta


def offload_groups(pipe: Any, **settings: Any) -> None:
    if Version(diffusers.__version__) < Version("0.37"):
        pytest.skip("this version offloads groups beside an accelerator only")
    pipe.enable_group_offload(onload_device=CPU, **settings)


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "models": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "leaves": offload_leaves,
    "groups of blocks": lambda pipe: offload_groups(
        pipe, offload_type="block_level", num_blocks_per_group=1
    ),
    "groups of leaves": lambda pipe: offload_groups(pipe, offload_type="leaf_level"),
}


@functools.cache
def not_offloaded(build: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    # latents without guidance, and with it
    pipe = build()
    plain = draw(pipe)
    with GUIDANCE.attach(pipe):
        return plain, draw(pipe)


@pytest.mark.parametrize(("build", "attached"), [(sd, "before"), (xl, "after")])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_networks_are_guided_picture_after_picture(
    offload: str, build: Callable[[], Any], attached: str
) -> None:
    plain, guided = not_offloaded(build)
    assert difference(guided, plain) > 1e-2
    pipe = build()
    if attached == "after":
        OFFLOADS[offload](pipe)
    with GUIDANCE.attach(pipe) as handle:
        if attached == "before":
            OFFLOADS[offload](pipe)
        for _ in range(3):
            assert torch.equal(draw(pipe), guided)
    assert handle.steps == 6
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("build", [sd, xl])
@pytest.mark.parametrize("part", ["slicing", "tiling"])
@torch.no_grad()
def test_guided_latents_are_decoded_in_parts(part: str, build: Callable[[], Any]) -> None:
    pipe = build()
    size = {"height": 96, "width": 96}
    arguments: dict[str, Any] = {"prompt": ["red", "blue"], "num_inference_steps": 1, **size}

    def pictures() -> Tensor:
        return pipe(**arguments, output_type="pt", generator=torch.manual_seed(0)).images

    with GUIDANCE.attach(pipe):
        whole = pictures()
        latents = pipe(**arguments, output_type="latent", generator=torch.manual_seed(0)).images
        getattr(pipe.vae, f"enable_{part}")()
        guided = pictures()
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert torch.equal(guided, pipe.image_processor.postprocess(decoded, "pt"))
    assert difference(guided, pictures()) > 1e-2
    assert (difference(guided, whole) < 1e-4) == (part == "slicing")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [sd, xl])
@torch.no_grad()
def test_half_precision_is_single_precision_but_for_its_rounding(
    build: Callable[[], Any], dtype: torch.dtype
) -> None:
    half = build().unet.to(dtype)
    single, scheduler = copy.deepcopy(half).float(), tiny_scheduler()
    width = half.config.cross_attention_dim
    with seeded(57):  # whose attention is nowhere near the threshold
        tensors = torch.randn(1, 4, 8, 8), torch.randn(2, 7, width), torch.randn(2, TEXT_WIDTH)
    x, texts, pooled = (tensor.to(dtype) for tensor in tensors)
    numbers = torch.full((2, 6), 64.0, dtype=dtype)

    def predict(unet: Any, timestep: int) -> Tensor:
        added = {"text_embeds": pooled.to(unet.dtype), "time_ids": numbers}
        halves = torch.cat([x, x]).to(unet.dtype)
        return unet(halves, timestep, texts.to(unet.dtype), added_cond_kwargs=added).sample.float()

    layout: dict[str, Any] = {"scheduler": scheduler, "batch_layout": "uncond_first"}
    scheduler.set_timesteps(10)
    for timestep in (901, 501, 101):
        plain = predict(single, timestep)
        with GUIDANCE.attach(half, **layout) as rough, GUIDANCE.attach(single, **layout) as exact:
            found, expected = predict(half, timestep), predict(single, timestep)
        assert difference(expected, plain) > 0.1
        assert difference(found, expected) < 8 * torch.finfo(dtype).eps
        assert torch.equal(rough.mask, exact.mask)


def test_a_callback_may_interrupt_a_guided_run() -> None:
    pipe = sd()
    seen: list[Tensor] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {}

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        pipe._interrupt = True
        return {}

    plain = draw(pipe)
    with GUIDANCE.attach(pipe) as handle:
        guided = draw(pipe, callback_on_step_end=note)
        assert torch.equal(draw(pipe, callback_on_step_end=interrupt), seen[0])
        assert handle.steps == 3
        assert torch.equal(draw(pipe), guided)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("stop", [0.5, 1.0])
def test_a_guided_run_of_sdxl_may_be_divided_between_two_pipelines(stop: float) -> None:
    base = xl_pipeline(StableDiffusionXLPipeline)
    refiner = StableDiffusionXLImg2ImgPipeline(**base.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    guidance = SelfAttentionGuidance(1.0, stop=stop)
    usual: dict[str, Any] = {"prompt": "red", "num_inference_steps": 4, "output_type": "latent"}
    size = {"height": 64, "width": 64}

    def latents(pipe: Any, **arguments: Any) -> Tensor:
        return pipe(**usual, **arguments, generator=torch.Generator().manual_seed(0)).images

    with guidance.attach(base):
        whole = latents(base, **size)
        first = latents(base, **size, denoising_end=0.5)
    with guidance.attach(refiner) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second = latents(refiner, image=first, denoising_start=0.5)
    assert handle.steps == (2 if stop == 1 else 0)
    unguided_part = "this run has 2 steps, from 0.5 of the way to its end"
    assert any(unguided_part in str(each.message) for each in caught) == (stop == 0.5)
    assert torch.equal(second, whole)
    unguided = latents(refiner, image=first, denoising_start=0.5)
    assert torch.equal(unguided, whole) == (stop == 0.5)
    assert difference(unguided, latents(base, **size)) > 1e-2
