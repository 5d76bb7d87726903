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

from test_stable_diffusion_tasks import (
    GUIDANCE,
    MASK,
    PICTURE,
    SIZE,
    Task,
    adapter,
    check_effect_trace_and_rows,
    check_second_pass,
    controlnet,
    draw,
)
from tiny import TEXT_WIDTH
from tiny_xl import xl_pipeline, xl_unet


def xl_controlnet(seed: int) -> ControlNetModel:
    return controlnet(seed, xl_unet())


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
        xl_pipeline(StableDiffusionXLControlNetPipeline, controlnet=xl_controlnet(3)),
        {"image": PICTURE},
    ),
    "ControlNet, guess mode": lambda: (
        xl_pipeline(StableDiffusionXLControlNetPipeline, controlnet=xl_controlnet(3)),
        {"image": PICTURE, "guess_mode": True},
    ),
    "two ControlNets": lambda: (
        xl_pipeline(
            StableDiffusionXLControlNetPipeline, controlnet=[xl_controlnet(3), xl_controlnet(4)]
        ),
        {"image": [PICTURE, PICTURE]},
    ),
    "T2I-Adapter": lambda: (
        xl_pipeline(StableDiffusionXLAdapterPipeline, adapter=adapter()),
        {"image": PICTURE, **SIZE},
    ),
}


@pytest.mark.supports("runs", "batch", pipeline="Stable Diffusion XL")
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


@pytest.mark.parametrize("pictures", [1, 2])
def test_three_conditions_are_refused_whatever_the_batch(pictures: int) -> None:
    pipe = xl_pipeline(StableDiffusionXLInstructPix2PixPipeline, unet=xl_unet(in_channels=8))
    arguments = {"image": PICTURE, **SIZE}
    plain = draw(pipe, tuple(range(pictures)), arguments)
    with pytest.raises(ValueError, match="batch"), GUIDANCE.attach(pipe):
        draw(pipe, tuple(range(pictures)), arguments)
    assert torch.equal(draw(pipe, tuple(range(pictures)), arguments), plain)
