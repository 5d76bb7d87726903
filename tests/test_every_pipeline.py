"""Offloading and compilation of every supported denoiser, each in a pipeline of diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import DiTPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from torch._dynamo.utils import counters

import test_guidance
from self_attention_guidance import SelfAttentionGuidance
from self_attention_guidance.models.originals import dit_scheduler
from test_dit_pipeline import with_1001_labels
from tiny import tiny_pipeline, tiny_vae
from tiny_transformers import TRANSFORMERS, draw
from tiny_xl import draw_kolors, kolors_pipeline, xl_pipeline

GUIDANCE = SelfAttentionGuidance(1.0, blur_sigma=2.0)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


def dit_pipeline() -> Any:
    pipe = DiTPipeline(with_1001_labels(), tiny_vae(), dit_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_transformer(name: str, pipe: Any) -> Tensor:
    return draw(name, pipe, (3,))


def draw_dit(pipe: Any) -> Tensor:
    pixels = pipe(
        [3],
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=3,
        output_type="np",
    ).images
    return torch.from_numpy(pixels)


Draw = Callable[[Any], Tensor]
PIPELINES: dict[str, tuple[Callable[[], Any], Draw]] = {
    "Stable Diffusion": (lambda: tiny_pipeline(StableDiffusionPipeline), test_guidance.draw),
    "Stable Diffusion XL": (lambda: xl_pipeline(StableDiffusionXLPipeline), test_guidance.draw),
    "Kolors": (kolors_pipeline, draw_kolors),
    "DiT": (dit_pipeline, draw_dit),
    **{
        name: (transformer.make, functools.partial(draw_transformer, name))
        for name, transformer in TRANSFORMERS.items()
    },
}


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    counters.clear()
    yield
    torch.compiler.reset()


def denoiser_of(pipe: Any) -> torch.nn.Module:
    return pipe.components["unet" if "unet" in pipe.components else "transformer"]


@pytest.mark.supports("offload")
@pytest.mark.parametrize("name", PIPELINES)
def test_every_picture_is_guided_while_weights_are_offloaded(name: str) -> None:
    make, draw = PIPELINES[name]
    pipe = make()
    plain, denoiser = draw(pipe), denoiser_of(pipe)
    with GUIDANCE.attach(pipe):
        guided = draw(pipe)
        assert not torch.equal(guided, plain)
        for offload in (cpu_offload_with_hook, cpu_offload):
            if offload is cpu_offload and name == "Hunyuan-DiT":
                continue  # its pooling reads weights outside of a forward pass
            for _ in range(2):  # model offloading removes its hooks after every picture
                offload(denoiser, CPU)
                assert torch.equal(draw(pipe), guided)
                remove_hook_from_module(denoiser, recurse=True)
    assert torch.equal(draw(pipe), plain)


BREAKS_ITS_GRAPH = ("Lumina 2", "HiDream")
"""Whose networks ask the device for numbers, guided or not: there is no whole graph of them."""


@pytest.mark.supports("compile")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_compiled_denoiser_is_guided_in_whole_graphs(name: str) -> None:
    make, draw = PIPELINES[name]
    pipe = make()
    with GUIDANCE.attach(pipe):
        guided = draw(pipe)
        denoiser_of(pipe).compile(backend="eager")
        compiled = []
        for _ in range(3):
            assert (draw(pipe) - guided).abs().max() < 1e-3 * guided.abs().max()
            compiled.append(counters["stats"]["unique_graphs"])
    assert 0 < compiled[1] == compiled[2]
    if name in BREAKS_ITS_GRAPH:
        assert counters["graph_break"]
        pytest.skip("without guidance, too, this network is no whole graph")
    assert not counters["graph_break"]
