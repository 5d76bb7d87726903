"""Compiled denoisers are guided, or refused; never silently unguided."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from self_attention_guidance import SelfAttentionGuidance, StableDiffusionSAGPipeline
from test_guidance import difference, draw
from tiny import tiny_pipeline

# "aot_eager" compiles as "inductor" does up to the code generator, which takes minutes here.
BACKEND = "aot_eager"
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline(StableDiffusionPipeline)


@pytest.fixture
def guided(pipe: StableDiffusionPipeline) -> Tensor:
    with SelfAttentionGuidance(1.0).attach(pipe):
        return draw(pipe)


@pytest.mark.parametrize("runs_before", [0, 1])
def test_guidance_attached_to_a_compiled_unet(
    pipe: StableDiffusionPipeline, guided: Tensor, runs_before: int
) -> None:
    pipe.unet = torch.compile(pipe.unet, backend=BACKEND)
    for _ in range(runs_before):
        draw(pipe)
    with SelfAttentionGuidance(1.0).attach(pipe) as handle:
        assert difference(draw(pipe), guided) < 1e-4
        assert difference(draw(pipe), guided) < 1e-4
    assert handle.steps == 6


@pytest.mark.parametrize("in_place", [False, True])
def test_compiling_a_guided_unet_until_guidance_is_removed(
    pipe: StableDiffusionPipeline, guided: Tensor, in_place: bool
) -> None:
    plain = draw(pipe)
    with SelfAttentionGuidance(1.0).attach(pipe) as handle:
        if in_place:
            pipe.unet.compile(backend=BACKEND)
        else:
            pipe.unet = torch.compile(pipe.unet, backend=BACKEND)
        assert difference(draw(pipe), guided) < 1e-4
    assert handle.steps == 3
    assert difference(draw(pipe), plain) < 1e-4


def test_the_pipeline_with_a_compiled_unet(guided: Tensor) -> None:
    sag: Any = tiny_pipeline(StableDiffusionSAGPipeline)
    sag.unet = torch.compile(sag.unet, backend=BACKEND)
    draw(sag, sag_scale=0)
    assert difference(draw(sag, sag_scale=1.0), guided) < 1e-4


def test_a_unet_compiled_in_place_before_is_refused(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.compile(backend=BACKEND)
    draw(pipe)
    with pytest.raises(ValueError, match="was compiled in place, where hooks are ignored"):
        SelfAttentionGuidance(1.0).attach(pipe)


def test_a_guided_unet_behind_a_compiled_one_is_found(pipe: StableDiffusionPipeline) -> None:
    with SelfAttentionGuidance(1.0).attach(pipe):
        pipe.unet = torch.compile(pipe.unet, backend=BACKEND)
        with pytest.raises(ValueError, match="guided already"):
            SelfAttentionGuidance(1.0).attach(pipe)


def test_a_whole_graph_is_refused_loudly(pipe: StableDiffusionPipeline) -> None:
    pipe.unet = torch.compile(pipe.unet, backend=BACKEND, fullgraph=True)
    with SelfAttentionGuidance(1.0).attach(pipe), pytest.raises(torch._dynamo.exc.Unsupported):
        draw(pipe)
