"""`attach` on diffusers' pipelines for the other tasks of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from self_attention_guidance import SelfAttentionGuidance
from tiny import seeded, tiny_pipeline, tiny_scheduler, tiny_unet

GUIDANCE = SelfAttentionGuidance(1.0, blur_sigma=2.0)
PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (16, 16, 48, 48))
SIZE: dict[str, Any] = {"height": 64, "width": 64}


def controlnet(seed: int, unet: UNet2DConditionModel | None = None) -> ControlNetModel:
    with seeded(seed):
        model = ControlNetModel.from_unet(unet or tiny_unet()).eval()
        for block in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)  # else it controls nothing
    return model


def adapter() -> T2IAdapter:
    with seeded(5):
        return T2IAdapter(
            channels=[32, 64], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
        ).eval()


Task = Callable[[], tuple[Any, dict[str, Any]]]
TASKS: dict[str, Task] = {
    "image to image": lambda: (tiny_pipeline(StableDiffusionImg2ImgPipeline), {"image": PICTURE}),
    "inpainting with a text-to-image network": lambda: (
        tiny_pipeline(StableDiffusionInpaintPipeline),
        {"image": PICTURE, "mask_image": MASK, **SIZE},
    ),
    "inpainting with a network of nine channels": lambda: (
        tiny_pipeline(StableDiffusionInpaintPipeline, unet=tiny_unet(in_channels=9)),
        {"image": PICTURE, "mask_image": MASK, **SIZE},
    ),
    "one ControlNet": lambda: (
        tiny_pipeline(StableDiffusionControlNetPipeline, controlnet=controlnet(3)),
        {"image": PICTURE},
    ),
    "ControlNet, guess mode": lambda: (
        tiny_pipeline(StableDiffusionControlNetPipeline, controlnet=controlnet(3)),
        {"image": PICTURE, "guess_mode": True},
    ),
    "two ControlNets": lambda: (
        tiny_pipeline(StableDiffusionControlNetPipeline, controlnet=[controlnet(3), controlnet(4)]),
        {"image": [PICTURE, PICTURE]},
    ),
    "T2I-Adapter": lambda: (
        tiny_pipeline(StableDiffusionAdapterPipeline, adapter=adapter()),
        {"image": PICTURE, **SIZE},
    ),
    "LCM": lambda: (
        tiny_pipeline(StableDiffusionPipeline, scheduler=tiny_scheduler(LCMScheduler)),
        SIZE,
    ),
    "TCD": lambda: (
        tiny_pipeline(StableDiffusionPipeline, scheduler=tiny_scheduler(TCDScheduler)),
        SIZE,
    ),
}


def draw(pipe: Any, seeds: tuple[int, ...], arguments: dict[str, Any], steps: int = 4) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        "red",
        num_images_per_prompt=len(seeds),
        num_inference_steps=steps,
        generator=generators,
        output_type="latent",
        **arguments,
    ).images


def check_effect_trace_and_rows(pipe: Any, arguments: dict[str, Any]) -> None:
    """Guidance acts, leaves no trace, and keeps the rows of a batch apart."""
    plain = draw(pipe, (3, 4), arguments)
    with SelfAttentionGuidance(0).attach(pipe) as off:
        assert torch.equal(draw(pipe, (3, 4), arguments), plain)
    assert off.steps == 0
    with GUIDANCE.attach(pipe) as handle:
        guided = draw(pipe, (3, 4), arguments)
        assert handle.steps >= 3
        assert (guided - plain).abs().max() > 1e-2
        # the first one: diffusers' inpainting itself gives the others other noise in a batch
        alone = draw(pipe, (3,), arguments)
        assert (alone - guided[:1]).abs().max() < 1e-4 * guided.abs().max()
    assert torch.equal(draw(pipe, (3, 4), arguments), plain)


def check_second_pass(pipe: Any, arguments: dict[str, Any], branch: Any) -> None:
    """It sees all that its branch sees, but for the latents."""
    seen: list[list[Tensor]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, timestep = args
        inputs = [sample[:, :4], sample[:, 4:], timestep.expand(len(sample))]
        seen.append(inputs + [leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)])

    pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    with SelfAttentionGuidance(1.0, branch=branch).attach(pipe):
        draw(pipe, (3, 4), {**arguments, "guidance_scale": 5.0}, steps=2)
    (x, *whole), (x_degraded, *degraded) = seen[:2]
    rows = slice(0, 2) if branch == "uncond" else slice(2, 4)
    assert x_degraded.shape == x[rows].shape
    assert not torch.equal(x_degraded, x[rows])
    assert len(whole) == len(degraded) >= 3
    for first, second in zip(whole, degraded, strict=True):
        assert torch.equal(second, first[rows])


@pytest.mark.supports("runs", "batch", pipeline="Stable Diffusion")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("task", TASKS)
def test_guidance_acts_leaves_no_trace_and_keeps_rows_apart(
    task: str, guidance_scale: float
) -> None:
    pipe, arguments = TASKS[task]()
    check_effect_trace_and_rows(pipe, {"guidance_scale": guidance_scale, **arguments})


@pytest.mark.parametrize("branch", ["uncond", "cond"])
@pytest.mark.parametrize("task", TASKS)
def test_the_second_pass_sees_all_that_its_branch_sees(task: str, branch: Any) -> None:
    check_second_pass(*TASKS[task](), branch)
