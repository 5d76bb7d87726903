"""The examples run as they are, and draw guided pictures."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from self_attention_guidance import (
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    attach,
    builtin_model,
)
from tiny_models import MODELS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Image.Image]:
    """What an example draws; further arguments are its own."""
    monkeypatch.chdir(tmp_path)

    def draw(name: str, *arguments: object) -> Image.Image:
        out = tmp_path / "out.png"
        program = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(each) for each in (program, out, *arguments)])
        runpy.run_path(str(program), run_name="__main__")
        with Image.open(out) as image:
            return image.copy()

    return draw


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 30


def test_the_drop_in_draws_what_attaching_draws(drawn: Callable[..., Image.Image]) -> None:
    pipe = StableDiffusionPipeline(**builtin_model("emoji").components)

    def picture() -> bytes:
        settings: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 3.0}
        return pipe("fruit", generator=seeded(4), **settings).images[0].tobytes()

    unguided = picture()
    with SelfAttentionGuidance(3.0).attach(pipe):
        guided = picture()
    assert drawn("drop_in").tobytes() == guided != unguided


def test_another_pipeline_draws_what_its_denoiser_draws(
    drawn: Callable[..., Image.Image],
) -> None:
    emoji: Any = builtin_model("emoji")
    pipe = StableDiffusionImg2ImgPipeline(**emoji.components)
    seed = seeded(1)
    source = emoji("red heart", num_inference_steps=25, generator=seed).images[0]
    begun = seed.get_state()
    pipe.scheduler = EulerDiscreteScheduler.from_config(emoji.scheduler.config)

    def picture() -> bytes:
        seed.set_state(begun)
        image = pipe("green apple", image=source, strength=0.7, generator=seed).images[0]
        return image.tobytes()

    unguided = picture()
    guidance = SelfAttentionGuidance(3.0, blur_sigma=3.0)
    with guidance.attach(pipe.unet, scheduler=pipe.scheduler, batch_layout="uncond_first"):
        guided = picture()
    assert drawn("any_pipeline").tobytes() == guided != unguided


def test_the_loop_draws_what_the_pipeline_draws(drawn: Callable[..., Image.Image]) -> None:
    pipe: Any = builtin_model("emoji-adm")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.guidance = SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.1)
    unguided, guided = (
        pipe(num_inference_steps=25, sag_scale=scale, generator=seeded(0)).images[0].tobytes()
        for scale in (0.0, 2.0)
    )
    assert drawn("raw_loop").tobytes() == guided != unguided


def test_the_papers_case_draws_what_the_library_draws(
    drawn: Callable[..., Image.Image],
) -> None:
    """Its pictures are (rows, columns) = (without and with guidance, seeds)."""
    picture = drawn("paper_adm")
    pipe = builtin_model("emoji-adm")
    pipe.guidance = SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.1, every=4)
    seeds = [seeded(seed) for seed in range(4)]
    images = pipe(batch_size=4, num_inference_steps=40, sag_scale=2.0, generator=seeds).images
    size = images[0].size[0]
    unguided, guided = (
        picture.crop((0, row * size, size, (row + 1) * size)).tobytes() for row in range(2)
    )
    assert guided == images[0].tobytes() != unguided


@pytest.mark.parametrize(("name", "passes"), [("sdxl", 30), ("flux", 5)])
def test_large_models_are_guided(
    drawn: Callable[..., Image.Image],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    passes: int,
) -> None:
    """There is no hub here: tiny networks of the same classes stand for the published ones."""
    folder = tmp_path / name
    MODELS[{"sdxl": "stable_diffusion_xl"}.get(name, name)]().save_pretrained(folder)
    picture = drawn(name, folder, *([64] if name == "flux" else []))
    assert capsys.readouterr().out == f"{passes} second passes\n"
    assert np.asarray(picture).std() > 1


def test_two_guidances_add_up(drawn: Callable[..., Image.Image]) -> None:
    pipe: Any = builtin_model("emoji")

    def picture(*guidances: Any) -> bytes:
        settings: dict[str, Any] = {"sag_scale": 0, "num_inference_steps": 25}
        with attach(pipe, *guidances):
            return pipe("fruit", generator=seeded(4), **settings).images[0].tobytes()

    shape = PerturbedAttentionGuidance(2.0, stop=0.5)
    detail = SelfAttentionGuidance(2.0, blur_sigma=3.0, start=0.3, stop=0.65)
    both = drawn("two_guidances").tobytes()
    assert both == picture(shape, detail)
    assert both not in (picture(shape), picture(detail))
