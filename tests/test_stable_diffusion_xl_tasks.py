"""`attach` on diffusers' pipelines for the other tasks of Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from self_attention_guidance import SelfAttentionGuidance
from test_stable_diffusion_tasks import GUIDANCE, MASK, PICTURE, SIZE, Task, adapter
from tiny import TEXT_WIDTH, seeded
from tiny_xl import xl_pipeline, xl_unet


def controlnet(seed: int) -> ControlNetModel:
    with seeded(seed):
        model = ControlNetModel.from_unet(xl_unet()).eval()
        for block in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)  # else it controls nothing
    return model


def refiner() -> Any:
    return xl_pipeline(
        StableDiffusionXLImg2ImgPipeline,
        text_encoder=None,
        tokenizer=None,
        unet=xl_unet(text_width=TEXT_WIDTH, numbers=5),
        requires_aesthetics_score=True,
    )


TASKS: dict[str, Task] = {
    "image to image": lambda: (
        xl_pipeline(StableDiffusionXLImg2ImgPipeline),
        {"image": PICTURE, "strength": 0.8},
    ),
    "refiner": lambda: (refiner(), {"image": PICTURE, "strength": 0.8}),
    "inpainting with a text-to-image network": lambda: (
        xl_pipeline(StableDiffusionXLInpaintPipeline),
        {"image": PICTURE, "mask_image": MASK, **SIZE},
    ),
    "inpainting with a network of nine channels": lambda: (
        xl_pipeline(StableDiffusionXLInpaintPipeline, unet=xl_unet(in_channels=9)),
        {"image": PICTURE, "mask_image": MASK, **SIZE},
    ),
    "one ControlNet": lambda: (
        xl_pipeline(StableDiffusionXLControlNetPipeline, controlnet=controlnet(3)),
        {"image": PICTURE},
    ),
    "ControlNet, guess mode": lambda: (
        xl_pipeline(StableDiffusionXLControlNetPipeline, controlnet=controlnet(3)),
        {"image": PICTURE, "guess_mode": True},
    ),
    "two ControlNets": lambda: (
        xl_pipeline(StableDiffusionXLControlNetPipeline, controlnet=[controlnet(3), controlnet(4)]),
        {"image": [PICTURE, PICTURE]},
    ),
    "T2I-Adapter": lambda: (
        xl_pipeline(StableDiffusionXLAdapterPipeline, adapter=adapter()),
        {"image": PICTURE, **SIZE},
    ),
}


def draw(pipe: Any, seeds: tuple[int, ...], arguments: dict[str, Any], steps: int = 3) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        "red",
        num_images_per_prompt=len(seeds),
        num_inference_steps=steps,
        generator=generators,
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.supports("runs", "batch", pipeline="Stable Diffusion XL")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("task", TASKS)
def test_guidance_acts_leaves_no_trace_and_keeps_rows_apart(
    task: str, guidance_scale: float
) -> None:
    pipe, arguments = TASKS[task]()
    arguments = {"guidance_scale": guidance_scale, **arguments}
    plain = draw(pipe, (3, 4), arguments)
    with SelfAttentionGuidance(0).attach(pipe) as off:
        assert torch.equal(draw(pipe, (3, 4), arguments), plain)
    assert off.steps == 0
    with GUIDANCE.attach(pipe) as handle:
        guided = draw(pipe, (3, 4), arguments)
        assert handle.steps >= 2
        assert (guided - plain).abs().max() > 1e-2
        # the first one: diffusers' inpainting itself gives the others other noise in a batch
        alone = draw(pipe, (3,), arguments)
        assert (alone - guided[:1]).abs().max() < 1e-4 * guided.abs().max()
    assert torch.equal(draw(pipe, (3, 4), arguments), plain)


@pytest.mark.parametrize("branch", ["uncond", "cond"])
@pytest.mark.parametrize("task", TASKS)
def test_the_second_pass_sees_all_that_its_branch_sees(task: str, branch: Any) -> None:
    pipe, arguments = TASKS[task]()
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
    assert len(whole) == len(degraded) >= 5
    for first, second in zip(whole, degraded, strict=True):
        assert torch.equal(second, first[rows])


@pytest.mark.parametrize("pictures", [1, 2])
def test_three_conditions_are_refused_whatever_the_batch(pictures: int) -> None:
    pipe = xl_pipeline(StableDiffusionXLInstructPix2PixPipeline, unet=xl_unet(in_channels=8))
    arguments = {"image": PICTURE, **SIZE}
    plain = draw(pipe, tuple(range(pictures)), arguments)
    with pytest.raises(ValueError, match="batch"), GUIDANCE.attach(pipe):
        draw(pipe, tuple(range(pictures)), arguments)
    assert torch.equal(draw(pipe, tuple(range(pictures)), arguments), plain)
