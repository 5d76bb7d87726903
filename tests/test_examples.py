"""The examples run as they are, and draw guided pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from self_attention_guidance import SelfAttentionGuidance, builtin_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def drawn(name: str, tmp_path: Path, *replacement: str) -> Image.Image:
    """What an example draws, also after a replacement in its text."""
    source = (EXAMPLES / f"{name}.py").read_text()
    if replacement:
        assert replacement[0] in source
        source = source.replace(*replacement)
    out = tmp_path / "out.png"
    subprocess.run(
        [sys.executable, "-c", source, out], check=True, capture_output=True, cwd=tmp_path
    )
    with Image.open(out) as image:
        return image.copy()


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("drop_in", "sag_scale=3.0"),
        ("any_pipeline", "SelfAttentionGuidance(3.0"),
        ("raw_loop", "SelfAttentionGuidance(2.0"),
        ("paper_adm", "(0.0, 2.0)"),
    ],
)
def test_an_example_is_short_and_its_guidance_has_an_effect(
    tmp_path: Path, name: str, scale: str
) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 30
    off = scale.replace("3.0", "1e-9").replace("2.0", "1e-9")
    guided, unguided = drawn(name, tmp_path), drawn(name, tmp_path, scale, off)
    assert guided.size == unguided.size
    assert guided.tobytes() != unguided.tobytes()
    assert len(guided.getcolors(2**20) or ()) > 50


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_drop_in_draws_what_attaching_draws(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline(**builtin_model("emoji").components)
    with SelfAttentionGuidance(3.0).attach(pipe):
        image = pipe("fruit", num_inference_steps=25, guidance_scale=3.0, generator=seeded(4))
    assert drawn("drop_in", tmp_path).tobytes() == image.images[0].tobytes()


def test_another_pipeline_draws_what_its_denoiser_draws(tmp_path: Path) -> None:
    emoji: Any = builtin_model("emoji")
    pipe = StableDiffusionImg2ImgPipeline(**emoji.components)
    seed = seeded(1)
    source = emoji("red heart", num_inference_steps=25, generator=seed).images[0]
    pipe.scheduler = EulerDiscreteScheduler.from_config(emoji.scheduler.config)
    guidance = SelfAttentionGuidance(3.0, blur_sigma=3.0)
    with guidance.attach(pipe.unet, scheduler=pipe.scheduler, batch_layout="uncond_first"):
        image = pipe("green apple", image=source, strength=0.7, generator=seed).images[0]
    assert drawn("any_pipeline", tmp_path).tobytes() == image.tobytes()


def test_the_loop_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    pipe: Any = builtin_model("emoji-adm")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.guidance = SelfAttentionGuidance(2.0, blur_sigma=3.0)
    image = pipe(num_inference_steps=25, generator=seeded(0)).images[0]
    assert drawn("raw_loop", tmp_path).tobytes() == image.tobytes()


def test_the_papers_case_draws_what_the_library_draws(tmp_path: Path) -> None:
    picture = drawn("paper_adm", tmp_path)
    pipe = builtin_model("emoji-adm")
    seeds = [seeded(seed) for seed in range(4)]
    images = pipe(batch_size=4, num_inference_steps=40, sag_scale=2.0, generator=seeds).images
    size = images[0].size[0]
    first = picture.crop((0, size, size, 2 * size))
    assert first.tobytes() == images[0].tobytes()
