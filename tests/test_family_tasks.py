"""Methods that weaken layers in diffusers' pipelines of other tasks, and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionControlNetInpaintPipeline
from torch import Tensor

import test_stable_diffusion_tasks
import test_transformer_tasks
from family import KINDS, METHODS, denoiser_of, difference
from self_attention_guidance import PerturbedAttentionGuidance, Step, TokenPerturbationGuidance
from test_stable_diffusion_tasks import MASK, PICTURE, controlnet
from tiny import tiny_pipeline
from tiny_transformers import draw

every_method = pytest.mark.parametrize("method", METHODS)
TASKS: dict[str, Any] = {
    **test_stable_diffusion_tasks.TASKS,
    "ControlNet, inpainting": lambda: (
        tiny_pipeline(StableDiffusionControlNetInpaintPipeline, controlnet=controlnet(3)),
        {"image": PICTURE, "mask_image": MASK, "control_image": PICTURE},
    ),
}


@pytest.mark.supports("method", pipeline="Stable Diffusion")
@every_method
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("task", TASKS)
def test_tasks_of_stable_diffusion(task: str, guidance_scale: float, method: str) -> None:
    pipe, arguments = TASKS[task]()
    arguments = {**arguments, "guidance_scale": guidance_scale}

    def latents(*seeds: int) -> Tensor:
        return test_stable_diffusion_tasks.draw(pipe, seeds, arguments)

    check(latents, METHODS[method](), pipe)


@pytest.mark.supports("method")
@every_method
@pytest.mark.parametrize("name", test_transformer_tasks.TASKS)
def test_tasks_of_transformers(name: str, method: str) -> None:
    family, make, arguments = test_transformer_tasks.TASKS[name]
    pipe, cfg = make(), None if name == "Flux Fill" else 3.0

    def latents(*seeds: int) -> Tensor:
        pictures = {"image": [test_transformer_tasks.PICTURE] * len(seeds)}
        return draw(family, pipe, seeds, cfg, **{**arguments, **pictures})

    check(latents, METHODS[method](), pipe)


def check(latents: Any, guidance: Any, pipe: Any) -> None:
    """Guidance acts, leaves no trace, and keeps the rows of a batch apart."""
    plain = latents(3, 4)
    with guidance.attach(pipe):
        guided = latents(3, 4)
        assert difference(guided, plain) > 1e-2
        # the first one: diffusers' inpainting itself gives the others other noise in a batch
        assert (latents(3) - guided[:1]).abs().max() < 1e-4 * guided.abs().max()
    assert torch.equal(latents(3, 4), plain)


def test_only_the_picture_that_is_denoised_is_weakened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux Kontext sees 6 words, 24 tokens of the picture, and 24 of another one."""
    _, make, arguments = test_transformer_tasks.TASKS["Flux Kontext"]
    pipe = make()
    inputs: list[Tensor] = []
    block = pipe.transformer.single_transformer_blocks[1]
    block.attn.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with TokenPerturbationGuidance(layers="single.1").attach(pipe):
        draw("Flux", pipe, (3,), 1.0, num_inference_steps=1, **arguments)
    usual, shuffled = inputs
    assert usual.shape[1] == 6 + 24 + 24
    assert difference(usual[:, :6], shuffled[:, :6]) < 1e-5
    assert difference(usual[:, 30:], shuffled[:, 30:]) < 1e-5
    assert difference(usual[:, 6:30], shuffled[:, 6:30]) > 0.1
    places: list[Any] = []
    whole = Step.attending

    def attending(self: Step, layers: Any, weaken: Any) -> Any:
        def note(operands: Any, kernel: Any) -> Tensor:
            places.append((operands.picture, operands.grid))
            return weaken(operands, kernel)

        return whole(self, layers, note)

    monkeypatch.setattr(Step, "attending", attending)
    with PerturbedAttentionGuidance(layers=["blocks.0", "single.1"]).attach(pipe):
        draw("Flux", pipe, (3,), 1.0, num_inference_steps=1, **arguments)
    assert places == [(slice(6, 30), (4, 6))] * 2


@every_method
@pytest.mark.parametrize("name", ["PixArt-Sigma", "Stable Diffusion 3.5", "Flux", "Qwen-Image"])
def test_half_precision(name: str, method: str) -> None:
    pipe = KINDS[name].make()
    denoiser_of(pipe).bfloat16()
    plain = draw(name, pipe, (3,), dtype=torch.bfloat16)
    with METHODS[method]().attach(pipe):
        guided = draw(name, pipe, (3,), dtype=torch.bfloat16)
    assert guided.isfinite().all()
    assert plain.dtype == guided.dtype
    assert difference(guided.float(), plain.float()) > 1e-2


@every_method
def test_attention_in_slices_or_without_kernels_is_weakened_alike(method: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    kind = KINDS["Stable Diffusion"]
    pipe = kind.make()
    with METHODS[method](2.0).attach(pipe):
        expected = kind.draw(pipe, (3, 4))
    for change in (lambda: pipe.enable_attention_slicing(1), lambda: None):
        change()
        with METHODS[method](2.0).attach(pipe):
            assert difference(kind.draw(pipe, (3, 4)), expected) < 1e-4
        pipe.unet.set_attn_processor(AttnProcessor())
